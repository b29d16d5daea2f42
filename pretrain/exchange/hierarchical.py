"""Columns go from node to node, and are gathered inside each: a ring of nodes in which every rank uses its own card.

At step t a node holds the columns of the t-th node before it. Every rank takes its place's columns from the same place
there, and the node gathers what came to its places: W / M ranks a node, M nodes. Gradients are summed inside the node,
each for the place whose columns they belong to, and travel on across nodes as in `ring`, two steps behind the columns.
Both are under way while the step before is computed. Each rank sends (M - 1) b D elements across nodes a sweep and
(W - M) b D inside, (W - 1) b D in all, and as many fp32 elements with gradients.

Sources: Liu et al. 2023, Ring Attention (arXiv:2310.01889); Cheng et al. 2024, Inf-CL (arXiv:2410.17243).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.exchange.base import Exchange
from pretrain.exchange.layout import Layout
from pretrain.exchange.relay import Buffers, Hop, Relay, Returning, Sums
from pretrain.exchange.transport import Alone, Transport, Work
from pretrain.exchange.trip import Arriving, Options, Trip, occupied
from pretrain.kernels.columns import Block, Pending, Share
from pretrain.kernels.pairing import Span

LAUNCHERS = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")


@dataclass
class Nodes(Trip):
    """A node's columns at a time."""

    inside: Transport = field(default_factory=Alone, kw_only=True)
    """To the ranks of this node."""
    across: Transport = field(default_factory=Alone, kw_only=True)
    """To the ranks of this place on all nodes."""

    def blocks(self) -> Iterator[Block]:
        return occupied(self._walk(list))

    def collect(self, share: Share) -> Pending:
        sums = Settling(self)
        for block in self._walk(sums.settle):
            sums.leave(self.shared(share, block))
        return sums.home()

    def node(self, step: int) -> Layout:
        """Who owns which of the columns that are here at a step, counted from that node's first."""
        first = self._first(step)
        return self.layout.among(first, first + self.inside.size, self.inside.rank)

    def neighbours(self) -> tuple[int, int]:
        """The nodes to give to and to take from."""
        return (self.across.rank + 1) % self.across.size, (self.across.rank - 1) % self.across.size

    def _walk(self, load: Callable[[], list[Sums]]) -> Iterator[Block]:
        """Every node's block; `load` says, at each step, what goes on to the next node besides columns."""
        columns, rooms, steps = Relay(*self.neighbours(), self.layout.filled(self.mine)), Buffers(), self.across.size
        coming = self._gather(columns.here, rooms)
        hop = Hop(self.across, [columns] if steps > 1 else [])
        for step in range(steps):
            hop.wait()
            work, gathered = coming
            work.wait()  # before the next hop, which brings columns to where these were gathered from
            if step + 1 < steps:
                coming = self._gather(columns.here, rooms)
            hop = Hop(self.across, [*([columns] if step + 2 < steps else []), *load()])
            yield self._block(step, gathered)
        hop.wait()

    def _gather(self, rows: Tensor, rooms: Buffers) -> tuple[Work, Tensor]:
        gathered = rooms.next(self.inside.size * len(rows), rows)
        return self.inside.all_gather(gathered, rows), gathered

    def _block(self, step: int, gathered: Tensor) -> Block:
        node, start = self.node(step), self.layout.starts[self._first(step)]
        partners = 0 if step else len(self.mine)
        return Block(node.packed(gathered), slice(start, start + node.total), Span(0, node.own.start, partners))

    def _first(self, step: int) -> int:
        """First rank of the node whose columns are here at a step."""
        return (self.across.rank - step) % self.across.size * self.inside.size


class Settling:
    """Gradients on their way: each node's is summed inside this one, and what belongs to its places goes on."""

    def __init__(self, trip: Nodes) -> None:
        self._trip, self._sums = trip, Sums(trip.layout, trip.accumulator, *trip.neighbours())
        self._left = self._settled = 0
        self._own = trip.mine
        self._under_way: deque[tuple[Work, Tensor, Tensor]] = deque()

    def leave(self, part: Tensor) -> None:
        """What this rank's rows add to the block of the next step."""
        parts = self._trip.node(self._left).unpacked(part.to(self._trip.accumulator))
        own = parts.new_empty(self._trip.layout.most, *parts.shape[1:])
        self._under_way.append((self._trip.inside.reduce_scatter(own, parts), own, parts))
        self._left += 1

    def settle(self) -> list[Sums]:
        """What may go on to the next node; the newest block's gradient is left to travel behind the next compute."""
        return self._next() if len(self._under_way) > 1 else []

    def home(self) -> Pending:
        """The rest of the way."""
        if self._trip.across.size == 1:
            work, own, parts = self._under_way.popleft()
            return Arriving(self._trip, work, own, held=parts)
        Hop(self._trip.across, self._next()).wait()
        last = self._next()
        own = self._own[: len(self._trip.mine)]
        return Returning(Hop(self._trip.across, last), own.to(torch.promote_types(own.dtype, torch.float32)), last)

    def _next(self) -> list[Sums]:
        """The oldest node's gradient joins what travels; the first is this node's own, and stays."""
        work, part, _ = self._under_way.popleft()
        work.wait()
        self._settled += 1
        if self._settled == 1:
            self._own = part
            return []
        self._sums.add(part)
        return [self._sums]


class Hierarchical(Exchange):
    """The exchange of a run on several nodes whose columns do not fit into memory at once."""

    trip = Nodes

    def __init__(self, transport: Transport, options: Options | None = None) -> None:
        """Collective: it connects the ranks of each node, and those of each place.

        A node has `options.node_size` ranks; by default as many as LOCAL_WORLD_SIZE (torchrun) or SLURM_NTASKS_PER_NODE
        says, else one, which makes it a ring of ranks.

        Raises:
            ValueError: nodes of that size do not make up the world.
        """
        super().__init__(transport, options)
        size = launched() if self.options.node_size is None else self.options.node_size
        if size < 1 or self.size % size:
            raise ValueError(
                f"node_size {size} must divide the number of ranks, {self.size}: set it to the ranks of one node"
            )
        self.inside, self.across = transport.split(size)

    @property
    def sent(self) -> int:
        return self.transport.sent + self.inside.sent + self.across.sent

    def depart(self, columns: Tensor, layout: Layout) -> Nodes:
        return Nodes(columns, layout, self.transport, self.options, inside=self.inside, across=self.across)


def launched() -> int:
    """Ranks of a node, as the launcher says; 1 where there is none."""
    return int(next((os.environ[name] for name in LAUNCHERS if os.environ.get(name)), 1))
