"""Columns go round one by one, their gradients behind them. Memory O(b D) on each of W ranks.

At step t rank r holds the columns of rank r - t. Their next hop is under way while it computes, and so is the sum of
what the earlier visitors added to their gradient: it arrives behind the step, takes this rank's share in, and goes on
with the next hop. The owner's own share stays at home, so that a gradient makes W - 1 hops like the columns. Each rank
sends (W - 1) b D elements a sweep, and as many fp32 elements with gradients.

Sources: Liu et al. 2023, Ring Attention (arXiv:2310.01889), which overlaps hops and compute; Cheng et al. 2024, Inf-CL
(arXiv:2410.17243), which brings it to contrastive losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pretrain.exchange.base import Exchange
from pretrain.exchange.relay import Hop, Relay, Returning, Sums
from pretrain.exchange.trip import Trip, occupied
from pretrain.kernels.columns import Block, Share


@dataclass
class Around(Trip):
    """One way round."""

    def blocks(self) -> Iterator[Block]:
        columns = self._columns()
        for step in range(self.transport.size):
            hop = Hop(self.transport, [columns] if self._more(step) else [])
            yield from occupied([self._block(step, columns.here)])
            hop.wait()

    def collect(self, share: Share) -> Returning:
        columns, sums = self._columns(), Sums(self.layout, self.accumulator, *self._neighbours())
        own = self.mine
        for step in range(self.transport.size):
            hop = Hop(self.transport, [columns] * self._more(step) + [sums] * (step > 1))
            part = self.shared(share, self._block(step, columns.here))
            hop.wait()
            if step:
                sums.add(part)
            else:
                own = part
        coming = [sums] if self.transport.size > 1 else []
        return Returning(Hop(self.transport, coming), own, coming)

    def _columns(self) -> Relay:
        return Relay(*self._neighbours(), self.layout.filled(self.mine))

    def _neighbours(self) -> tuple[int, int]:
        """Whom to give to, whom to take from."""
        rank, size = self.transport.rank, self.transport.size
        return (rank + 1) % size, (rank - 1) % size

    def _more(self, step: int) -> bool:
        return step + 1 < self.transport.size

    def _block(self, step: int, columns: Tensor) -> Block:
        return self.block((self.transport.rank - step) % self.transport.size, columns)


class Ring(Exchange):
    """The exchange of a run whose columns do not fit into memory at once, on ranks with equally fast neighbours."""

    trip = Around
