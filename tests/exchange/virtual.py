"""Ranks as threads, and messages that make the most of every freedom a network has.

What is received is NaN from the moment it is asked for until it was waited for. What is sent is read as late as it may
be, and must not have changed since it was posted. Ranks are slowed down at random, from a seed. A message nobody takes,
an order that differs between ranks, or memory used twice at a time ends the run with a `HazardError` on every rank.
"""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class HazardError(AssertionError):
    """What a real network would have answered with wrong numbers or a hang."""


@dataclass
class Post:
    """One rank's part of an operation."""

    rank: int
    given: list[tuple[Tensor, int]]
    """What it sends, and to whom; -1: to everyone."""
    taken: list[tuple[Tensor, int]]
    sums: list[int] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    """Of what it sends, once its sender was told that it may use the memory again."""

    def to(self, rank: int) -> list[int]:
        return [n for n, (_, peer) in enumerate(self.given) if peer == rank]

    def asks(self, rank: int) -> int:
        return sum(peer == rank for _, peer in self.taken)


@dataclass
class Room:
    """The ranks of a group, and what they have posted: operation n of every rank belongs together."""

    name: str
    size: int
    operations: list[tuple[str, dict[int, Post]]] = field(default_factory=list)


class World:
    """`size` ranks, each a thread while `run` lasts."""

    def __init__(self, size: int, seed: int = 0, patience_s: float = 2.0, delay_s: float = 0.001) -> None:
        self.size, self.patience_s, self.delay_s = size, patience_s, delay_s
        self.changed, self.failure = threading.Condition(), ""
        self.events: list[tuple[int, str]] = []
        self.rooms = {"world": Room("world", size)}
        self.chances = [random.Random(f"{seed} {rank}") for rank in range(size)]
        self.slow = random.Random(seed).randrange(size)
        self.pending: list[list[Under]] = [[] for _ in range(size)]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(transport, *args)` returns on each rank; the first error that any raised."""
        found: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def rank_of(rank: int) -> None:
            try:
                found[rank] = function(VirtualTransport(self, self.rooms["world"], rank, rank), *args)
                left = [under.what for under in self.pending[rank]]
                if left:
                    self.fail(f"rank {rank} never waited for {', '.join(left)}")
            except BaseException as error:
                errors.append(error)
                with self.changed:
                    self.failure = self.failure or f"rank {rank}: {error!r}"
                    self.changed.notify_all()

        threads = [threading.Thread(target=rank_of, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), f"a rank hangs: {self.failure}"
        if errors:
            raise errors[0]
        return found

    def fail(self, why: str) -> None:
        with self.changed:
            self.failure = self.failure or why
            self.changed.notify_all()
        raise HazardError(why)

    def dawdle(self, rank: int) -> None:
        chance = self.chances[rank]
        if chance.random() < (0.8 if rank == self.slow else 0.2):
            time.sleep(chance.random() * self.delay_s)

    def note(self, rank: int, event: str) -> None:
        self.events.append((rank, event))


class VirtualTransport:
    """`pretrain.exchange.transport.Transport` between threads."""

    talks_on = torch.device("cpu")

    def __init__(self, world: World, room: Room, rank: int, thread: int) -> None:
        self.world, self.room, self.rank, self.thread = world, room, rank, thread
        self.size, self.sent, self._next = room.size, 0, 0

    def all_gather(self, gathered: Tensor, own: Tensor) -> Under:
        self.sent += (self.size - 1) * own.nbytes
        self._fits(gathered, own)

        def arrive(payloads: list[Tensor]) -> None:
            gathered.copy_(torch.cat([payload.view(own.shape) for payload in payloads]))

        return self._together("all_gather", own, gathered, arrive)

    def reduce_scatter(self, own: Tensor, parts: Tensor) -> Under:
        self.sent += (self.size - 1) * own.nbytes
        self._fits(parts, own)

        def arrive(payloads: list[Tensor]) -> None:
            total = torch.zeros_like(own)
            for payload in payloads:  # rounded after each, as a ring of ranks does it
                total += payload.view(self.size, *own.shape)[self.rank]
            own.copy_(total)

        return self._together("reduce_scatter", parts, own, arrive)

    def all_reduce(self, total: Tensor, largest: bool = False) -> Under:
        self.sent += 2 * (self.size - 1) * total.nbytes // self.size

        def arrive(payloads: list[Tensor]) -> None:
            joined = torch.stack([payload.view(total.shape) for payload in payloads])
            total.copy_(joined.amax(0) if largest else joined.sum(0))

        return self._together("all_reduce max" if largest else "all_reduce", total.clone(), total, arrive)

    def swap(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Under:
        self.sent += sum(tensor.nbytes for tensor, _ in sends)
        under = self._post("swap", list(sends), list(receives))
        under.peers = {peer for _, peer in [*sends, *receives]}
        if self.rank in under.peers:
            self.world.fail(f"rank {self.rank} sends to itself")
        return under

    def split(self, node_size: int) -> tuple[VirtualTransport, VirtualTransport]:
        self._post(f"split {node_size}", [], []).wait()
        node, place = divmod(self.rank, node_size)
        inside = self._room(f"inside {node} of {node_size}", node_size)
        across = self._room(f"across {place} of {node_size}", self.size // node_size)
        world, thread = self.world, self.thread
        return VirtualTransport(world, inside, place, thread), VirtualTransport(world, across, node, thread)

    def _room(self, name: str, size: int) -> Room:
        with self.world.changed:
            return self.world.rooms.setdefault(f"{self.room.name}/{name}", Room(f"{self.room.name}/{name}", size))

    def _fits(self, many: Tensor, one: Tensor) -> None:
        if many.numel() != self.size * one.numel() or many.dtype != one.dtype:
            self.world.fail(f"{list(many.shape)} {many.dtype} is not {self.size} times {list(one.shape)} {one.dtype}")

    def _together(self, kind: str, given: Tensor, taken: Tensor, arrive: Callable[[list[Tensor]], None]) -> Under:
        under = self._post(f"{kind} {given.numel()} {given.dtype}", [(given, -1)], [(taken, -1)])
        under.peers, under.arrive = set(range(self.size)), arrive
        return under

    def _post(self, kind: str, given: list[tuple[Tensor, int]], taken: list[tuple[Tensor, int]]) -> Under:
        world = self.world
        world.dawdle(self.thread)
        with world.changed:
            if world.failure:
                raise HazardError(world.failure)
            if self._next == len(self.room.operations):
                self.room.operations.append((kind, {}))
            wanted, posts = self.room.operations[self._next]
            what = f"operation {self._next} in {self.room.name}, {kind}"
            if wanted != kind:
                world.fail(f"rank {self.rank} posts {what} where {sorted(posts)} posted {wanted}")
            post = posts[self.rank] = Post(self.rank, given, taken)
            under = Under(self, what, post, posts)
            under.check_memory()
            post.sums = [checksum(tensor) for tensor, _ in given]
            for tensor, _ in taken:
                poison(tensor)
            under.poisoned = [checksum(tensor) for tensor, _ in taken]
            world.pending[self.thread].append(under)
            self._next += 1
            world.note(self.thread, f"post {kind.split()[0]}")
            world.changed.notify_all()
        return under


class Under:
    """An operation under way on one rank."""

    def __init__(self, transport: VirtualTransport, what: str, post: Post, posts: dict[int, Post]) -> None:
        self.transport, self.world, self.what, self.post, self.posts = transport, transport.world, what, post, posts
        self.peers: set[int] = set()
        self.arrive: Callable[[list[Tensor]], None] | None = None
        self.poisoned: list[int] = []
        self.done = False

    def wait(self) -> None:
        if self.done:
            return
        world, own = self.world, self.post
        world.dawdle(self.transport.thread)
        with world.changed, torch.no_grad():
            if not world.changed.wait_for(lambda: world.failure or self.peers <= set(self.posts), world.patience_s):
                missing = sorted(self.peers - set(self.posts))
                world.fail(f"rank {own.rank} waits for {self.what}, which {missing} never posted")
            if world.failure:
                raise HazardError(world.failure)
            if [checksum(tensor) for tensor, _ in own.taken] != self.poisoned:
                world.fail(f"rank {own.rank} wrote into what {self.what} receives")
            own.copies = [self._payload(own, n) for n in range(len(own.given))]
            self._receive()
            world.pending[self.transport.thread].remove(self)
            world.note(self.transport.thread, f"wait {self.what.rpartition(', ')[2].split()[0]}")
            self.done = True

    def _receive(self) -> None:
        own = self.post
        if self.arrive is not None:
            self.arrive([self._payload(self.posts[rank], 0) for rank in sorted(self.posts)])
            return
        for peer in self.peers:
            coming, going = self.posts[peer].to(own.rank), own.to(peer)
            if len(coming) != own.asks(peer) or len(going) != self.posts[peer].asks(own.rank):
                self.world.fail(f"ranks {own.rank} and {peer} do not send each other what they expect: {self.what}")
            targets = [tensor for tensor, source in own.taken if source == peer]
            for n, tensor in zip(coming, targets, strict=True):
                payload = self._payload(self.posts[peer], n)
                if payload.shape != tensor.shape or payload.dtype != tensor.dtype:
                    self.world.fail(
                        f"{list(payload.shape)} arrives where {list(tensor.shape)} is expected: {self.what}"
                    )
                tensor.copy_(payload)

    def _payload(self, post: Post, n: int) -> Tensor:
        """What a rank sent: read now, unless its sender has been told before that it may use the memory again."""
        if post.copies:
            return post.copies[n]
        tensor = post.given[n][0]
        if checksum(tensor) != post.sums[n]:
            self.world.fail(f"rank {post.rank} changed what it was sending: {self.what}")
        return tensor.detach().clone()

    def check_memory(self) -> None:
        """Nothing may be received into memory under way in either direction, and nothing sent that has not arrived."""
        given, taken = ([span(tensor) for tensor, _ in way] for way in (self.post.given, self.post.taken))
        for other in [*self.world.pending[self.transport.thread], self]:
            sending, receiving = ([span(t) for t, _ in way] for way in (other.post.given, other.post.taken))
            if meet(taken, sending) or meet(given, receiving) or (other is not self and meet(taken, receiving)):
                self.world.fail(
                    f"rank {self.post.rank}: {self.what} uses memory of {other.what} before it was waited for"
                )
        if any(not tensor.is_contiguous() for tensor, _ in [*self.post.given, *self.post.taken]):
            self.world.fail(f"rank {self.post.rank}: {self.what} of memory that is not contiguous")


def span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def meet(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(max(a[0], b[0]) < min(a[1], b[1]) for a in some for b in others)


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())


def poison(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.reshape(-1).view(torch.uint8).fill_(0x7F)
