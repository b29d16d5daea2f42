"""The messages of an exchange: four kinds of them, each started at once, waited for later, and counted in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.phases import phase

Group = dist.ProcessGroup | None

# torch 2.13 renames both and warns about the names that every earlier release has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """Something under way. Until it was waited for, nothing may touch what it receives or overwrite what it sends."""

    def wait(self) -> object: ...


class Transport(Protocol):
    """How W ranks reach each other. Every rank starts the same messages in the same order."""

    rank: int
    size: int
    sent: int
    """Bytes that left this rank so far; a collective counts as its ring algorithm, the least that is possible."""

    @property
    def talks_on(self) -> torch.device:
        """Where small messages of the ranks' agreement go: the CPU where it can, which no GPU waits for."""
        ...

    def all_gather(self, gathered: Tensor, own: Tensor) -> Work:
        """gathered [W * b, ...] becomes every rank's own [b, ...], in rank order. Sends (W - 1) own."""
        ...

    def reduce_scatter(self, own: Tensor, parts: Tensor) -> Work:
        """own [b, ...] becomes the sum over ranks of this rank's part of parts [W * b, ...]. Sends (W - 1) own."""
        ...

    def all_reduce(self, total: Tensor, largest: bool = False) -> Work:
        """total becomes its sum over ranks, or its elementwise maximum. Sends 2 (W - 1) / W total."""
        ...

    def swap(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Work:
        """Messages to and from other ranks in one batch, which cannot deadlock: (tensor, rank) each."""
        ...

    def split(self, node_size: int) -> tuple[Transport, Transport]:
        """Ways to the `node_size` ranks of this rank's node, and to the ranks of its place on all nodes. Collective.

        What is sent on them counts in their own `sent`.
        """
        ...


class Collectives:
    """torch.distributed over a process group."""

    def __init__(self, rank: int, size: int, group: Group = None) -> None:
        """
        Args:
            rank: this process in the group.
            size: of the group.
            group: default: all processes.

        Raises:
            ValueError: the group has another size or rank.
        """
        found = (dist.get_rank(group), dist.get_world_size(group))
        if found != (rank, size):
            raise ValueError(
                f"rank {rank} of {size} cannot exchange in a process group where it is rank {found[0]} of {found[1]}"
            )
        self.rank, self.size, self.group, self.sent = rank, size, group, 0

    @property
    def talks_on(self) -> torch.device:
        on_cpu = "cpu:" in dist.get_backend_config(self.group)
        return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def all_gather(self, gathered: Tensor, own: Tensor) -> Work:
        self.sent += (self.size - 1) * own.nbytes
        return _Started("all_gather", _all_gather(gathered, own, group=self.group, async_op=True))

    def reduce_scatter(self, own: Tensor, parts: Tensor) -> Work:
        self.sent += (self.size - 1) * own.nbytes
        return _Started("reduce_scatter", _reduce_scatter(own, parts, group=self.group, async_op=True))

    def all_reduce(self, total: Tensor, largest: bool = False) -> Work:
        self.sent += 2 * (self.size - 1) * total.nbytes // self.size
        kind = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        return _Started("all_reduce", dist.all_reduce(total, kind, group=self.group, async_op=True))

    def swap(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Work:
        self.sent += sum(tensor.nbytes for tensor, _ in sends)
        ways = ((dist.isend, sends), (dist.irecv, receives))
        operations = [
            dist.P2POp(way, tensor, group=self.group, group_peer=peer)
            for way, messages in ways
            for tensor, peer in messages
        ]
        return _Started("swap", *(dist.batch_isend_irecv(operations) if operations else []))

    def split(self, node_size: int) -> tuple[Transport, Transport]:
        place, node = self.rank % node_size, self.rank // node_size
        everyone = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        inside = self._among(everyone[node * node_size : (node + 1) * node_size], place)
        return inside, self._among(everyone[place::node_size], node)

    def _among(self, ranks: list[int], rank: int) -> Transport:
        """A way to some of these ranks, global numbers in ascending order; known to them alone, so that groups of a
        run may split independently of each other."""
        if len(ranks) in (1, self.size):
            return Alone() if len(ranks) == 1 else Collectives(rank, self.size, self.group)
        whole: Any = self.group or dist.group.WORLD
        # Connected at once where this way was: a first message between two ranks only is a way into a deadlock.
        device = getattr(whole, "bound_device_id", None)
        how: dict[str, Any] = {} if device is None else {"device_id": device}
        # torch would give a group of a group its own half hour.
        how["timeout"] = whole._get_backend(whole._device_types[0]).options._timeout
        return Collectives(rank, len(ranks), dist.new_group(ranks, use_local_synchronization=True, **how))


class _Started:
    """Messages under way, as one; waiting for them is a phase of its own."""

    def __init__(self, kind: str, *works: Work | None) -> None:
        self._kind, self._works = kind, works

    def wait(self) -> None:
        with phase("exchange", self._kind):
            for work in self._works:
                if work is not None:
                    work.wait()


class Alone:
    """One rank: what it sends is what it receives."""

    rank, size, sent, talks_on = 0, 1, 0, torch.device("cpu")

    def all_gather(self, gathered: Tensor, own: Tensor) -> Work:
        gathered.copy_(own)
        return _Started("nothing")

    def reduce_scatter(self, own: Tensor, parts: Tensor) -> Work:
        own.copy_(parts)
        return _Started("nothing")

    def all_reduce(self, total: Tensor, largest: bool = False) -> Work:
        return _Started("nothing")

    def swap(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Work:
        if sends or receives:
            raise ValueError(f"one rank has nobody to send {len(sends)} messages to")
        return _Started("nothing")

    def split(self, node_size: int) -> tuple[Transport, Transport]:
        return self, self
