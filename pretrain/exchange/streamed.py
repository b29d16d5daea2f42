"""All columns in K slices: while one is computed the next is gathered, and the gradient of the one before goes home.

Slice k is rows [k m / K, (k + 1) m / K) of every rank, m being the most rows of any. Memory O(N D / K), collectives
only, which use every link of a machine at once. Each rank sends (W - 1) b D elements a sweep, and as many fp32 elements
with gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pretrain.exchange.base import Exchange
from pretrain.exchange.layout import Layout
from pretrain.exchange.relay import Buffers
from pretrain.exchange.transport import Work
from pretrain.exchange.trip import Arriving, Trip
from pretrain.kernels.columns import Block, Share
from pretrain.kernels.pairing import Span


@dataclass(frozen=True)
class Slice:
    """The same few rows of every rank."""

    whole: Layout
    rows: slice
    """Of each rank's columns, as far as it has them."""

    @property
    def layout(self) -> Layout:
        """Who owns which columns of this slice."""
        return self.whole.between(self.rows.start, self.rows.stop)

    def block(self, gathered: Tensor) -> Block:
        layout = self.layout
        span = Span(self.rows.start, layout.own.start, layout.counts[layout.rank])
        return Block(layout.packed(gathered), self.numbers(gathered.device), span)

    def numbers(self, device: torch.device) -> slice | Tensor:
        """Of this slice's columns among the N."""
        counts, first = self.layout.counts, self.rows.start
        owners = [(start + first, count) for start, count in zip(self.whole.starts, counts, strict=False) if count]
        if all(start + count == after for (start, count), (after, _) in pairwise(owners)):
            return slice(owners[0][0], sum(owners[-1]))
        if self.whole.even:  # two launches, however many ranks there are
            ranks = torch.arange(0, self.whole.total, self.whole.most, device=device)
            return (ranks[:, None] + torch.arange(first, self.rows.stop, device=device)).flatten()
        return torch.cat([torch.arange(start, start + count, device=device) for start, count in owners])


@dataclass
class Stream(Trip):
    """A slice at a time."""

    def blocks(self) -> Iterator[Block]:
        for _, block in self._walk():
            yield block

    def collect(self, share: Share) -> Arriving:
        gradient = self.mine.new_empty(self.layout.most, *self.mine.shape[1:], dtype=self.accumulator)
        leaving: tuple[Work, Tensor] | None = None
        for one, block in self._walk():
            parts = one.layout.unpacked(share(block).to(self.accumulator))
            if leaving is not None:
                leaving[0].wait()
            leaving = self.transport.reduce_scatter(gradient[one.rows], parts), parts
        assert leaving is not None
        return Arriving(self, leaving[0], gradient, held=leaving[1])

    def _walk(self) -> Iterator[tuple[Slice, Block]]:
        own, slices, buffers = self.layout.filled(self.mine), self._slices(), Buffers()
        longest = max(one.rows.stop - one.rows.start for one in slices)

        def ask(one: Slice) -> tuple[Work, Tensor]:
            rows = own[one.rows]
            gathered = buffers.next(self.transport.size * longest, own)[: self.transport.size * len(rows)]
            return self.transport.all_gather(gathered, rows), gathered

        coming = ask(slices[0])
        for one, after in zip(slices, [*slices[1:], None], strict=True):
            work, gathered = coming
            if after is not None:
                coming = ask(after)
            work.wait()
            yield one, one.block(gathered)

    def _slices(self) -> list[Slice]:
        most = self.layout.most
        pieces = max(1, min(self.options.slices, most))
        edges = [n * most // pieces for n in range(pieces + 1)]
        return [Slice(self.layout, slice(first, last)) for first, last in pairwise(edges)]


class Streamed(Exchange):
    """The exchange of a run whose columns do not fit into memory at once, on any network."""

    trip = Stream
