"""One rank of W without the others: every message takes as long as on a link, and brings back what was sent.

An exchange, its kernels and its posting of messages run as they are; only the other ranks are missing, whose features
are taken to be this rank's own. Figures from here are of emulated links, and are labelled so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from pretrain.exchange.transport import Work

Copies = Sequence[tuple[Tensor, Tensor]]
"""(target, source) of equally many bytes."""


class Link(Protocol):
    """What carries messages, one after another."""

    name: str

    def move(self, copies: Copies, size: int) -> Work:
        """Start to make the copies, taking as long as `size` bytes need."""
        ...


class Done:
    """Nothing to wait for."""

    def wait(self) -> None: ...


class InstantLink:
    """Takes no time: what is left is compute."""

    name = "instant"

    def move(self, copies: Copies, size: int) -> Work:
        for target, source in copies:
            target.copy_(source)
        return Done()


class Recorder:
    """A link that also keeps what it was asked to carry, so that the messages can be repeated alone."""

    def __init__(self, link: Link) -> None:
        self._link, self.name = link, link.name
        self.moves: list[tuple[Copies, int]] = []

    def move(self, copies: Copies, size: int) -> Work:
        self.moves.append((copies, size))
        return self._link.move(copies, size)

    def repeat(self) -> None:
        """The messages without anything beside them."""
        for work in [self._link.move(copies, size) for copies, size in self.moves]:
            work.wait()


class SleepingLink:
    """For a CPU: a thread that sleeps through each message's time, which leaves the processors to the compute."""

    def __init__(self, bytes_per_s: float, latency_s: float = 0.0) -> None:
        self.name = f"sleeping {bytes_per_s / 1e9:.3g} GB/s"
        self._bytes_per_s, self._latency_s = bytes_per_s, latency_s
        self._thread = ThreadPoolExecutor(1)
        self._free_at, self._lock = 0.0, threading.Lock()

    def move(self, copies: Copies, size: int) -> Work:
        with self._lock:  # sleeping until a moment, not for a time: a thread that wakes late delays no later message
            self._free_at = max(self._free_at, time.monotonic()) + self._latency_s + size / self._bytes_per_s
            return _Awaited(self._thread.submit(_copy_at, self._free_at, copies))


def _copy_at(moment: float, copies: Copies) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
    for target, source in copies:
        target.copy_(source)


class _Awaited:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class StreamLink:
    """For a GPU: copies on a stream of their own, which starts after what was computed until then, as NCCL's does."""

    def __init__(self, name: str, copy: Callable[[Tensor, Tensor], None]) -> None:
        self.name, self._copy = name, copy
        self._stream = torch.cuda.Stream(priority=-1)

    def move(self, copies: Copies, size: int) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                self._copy(target, source)
            for tensor in (tensor for pair in copies for tensor in pair):
                tensor.record_stream(self._stream)
            done = torch.cuda.Event()
            done.record()
        return _Event(done)


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


def nvlink(programs: int, spin: int) -> StreamLink:
    """Copies by a few of the GPU's processors."""
    from benchmarks.throttled_copy import throttled_copy  # triton is for GPUs only

    delay = torch.zeros(2, device="cuda")

    def copy(target: Tensor, source: Tensor) -> None:
        throttled_copy(target, source, programs, spin, delay)

    return StreamLink(f"{programs} processors, spin {spin}", copy)


def card() -> StreamLink:
    """Copies to the host and back by the copy engines, both ways at once: about what one network card carries, without
    taking processors."""
    back = torch.cuda.Stream()
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(target: Tensor, source: Tensor) -> None:
        size = source.nbytes
        if size not in held:
            out, home = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2))
            home.copy_(source.view(-1).view(torch.uint8))  # what comes back must be features, not any bits
            held[size] = (out, home)
        out, home = held[size]
        back.wait_stream(torch.cuda.current_stream())
        out.copy_(source.view(-1).view(torch.uint8), non_blocking=True)
        with torch.cuda.stream(back):
            target.view(-1).view(torch.uint8).copy_(home, non_blocking=True)
            target.record_stream(back)
        torch.cuda.current_stream().wait_stream(back)

    return StreamLink("host and back by copy engines", copy)


class EmulatedTransport:
    """Rank 0 of `size`: `pretrain.exchange.transport.Transport`."""

    def __init__(self, size: int, link: Link, device: torch.device, across: Link | None = None) -> None:
        """
        Args:
            size: number of ranks.
            link: to the others, or to those of the same node.
            device: on which messages lie.
            across: to other nodes; default: the same.
        """
        self.rank, self.size, self.sent, self.talks_on = 0, size, 0, device
        self._link, self._across = link, across or link

    def all_gather(self, gathered: Tensor, own: Tensor) -> Work:
        parts = gathered.view(self.size, *own.shape)
        parts[0].copy_(own)
        return self._move([(part, own) for part in parts[1:]])

    def reduce_scatter(self, own: Tensor, parts: Tensor) -> Work:
        part = parts.view(self.size, *own.shape)[0]
        # Every other rank's share crosses the link, here into the same place.
        return self._move([(own, part)] * (self.size - 1)) if self.size > 1 else InstantLink().move([(own, part)], 0)

    def all_reduce(self, total: Tensor, largest: bool = False) -> Work:
        size = 2 * (self.size - 1) * total.nbytes // self.size
        self.sent += size
        return Done()

    def swap(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Work:
        pairs = zip((tensor for tensor, _ in receives), (tensor for tensor, _ in sends), strict=True)
        return self._move(list(pairs))

    def split(self, node_size: int) -> tuple[EmulatedTransport, EmulatedTransport]:
        nodes = self.size // node_size
        return (
            EmulatedTransport(node_size, self._link, self.talks_on),
            EmulatedTransport(nodes, self._across, self.talks_on),
        )

    def _move(self, copies: list[tuple[Tensor, Tensor]]) -> Work:
        size = sum(source.nbytes for _, source in copies)
        self.sent += size
        return self._link.move(copies, size) if copies else Done()
