"""Columns go round both ways at once: half the hops of a ring, for links that carry both directions side by side.

At step t rank r holds the columns of ranks r - t, which go up, and r + t, which go down. With an even number of ranks
the columns of the rank opposite come last, cut in two halves, one each way; two ranks are only neighbours, once. Every
block's gradient grows in two sums, one a direction. The last visitor of a direction sends it straight to its owner
instead of round the rest of the ring, and so does the rank opposite with its share, while the owner's own never leaves.

Bytes: W - 1 foreign visitors of a block send its gradient on once each, whatever the route, as many as sums that every
visitor would send home by itself; growing sums go between neighbours, all but three of them. Each rank sends
(W - 1) b D elements a sweep, and as many fp32 elements with gradients: as much as in one direction.

Source: Wang et al. 2024, TokenRing (arXiv:2412.20501), which sends results straight to their owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pretrain.exchange.base import Exchange
from pretrain.exchange.relay import Hop, Mover, Pass, Relay, Returning, Sums
from pretrain.exchange.trip import Trip, occupied
from pretrain.kernels.columns import Block, Share


@dataclass
class Meeting:
    """The last hop to the rank opposite: what goes up brings the first rows, what goes down the others."""

    up: Relay
    down: Relay
    cut: int

    def passes(self) -> list[Pass]:
        given, to, taken, source = self.up.passes()[0]
        upper = Pass(given[: self.cut], to, taken[: self.cut], source)
        return [upper, Pass(self.down.here[self.cut :], self.down.to, taken[self.cut :], self.down.source)]

    def arrived(self) -> None:
        self.up.arrived()


@dataclass
class BothWays(Trip):
    """Up and down at once."""

    def blocks(self) -> Iterator[Block]:
        columns = self._columns()
        for step in range(self._half + 1):
            hop = Hop(self.transport, self._moving(step, columns))
            yield from occupied(self._visitors(step, columns))
            hop.wait()
        if self._opposite:
            yield from occupied([self.block(self._at(self._opposite), columns[0].here)])

    def collect(self, share: Share) -> Returning:
        columns, sums = self._columns(), [Sums(self.layout, self.accumulator, *way) for way in self._ways()]
        own = self.mine
        for step in range(self._half + 1):
            hop = Hop(self.transport, [*self._moving(step, columns), *(sums if step > 1 else [])])
            parts = [self.shared(share, block) for block in self._visitors(step, columns)]
            hop.wait()
            if step:
                for one, part in zip(sums, parts, strict=True):
                    one.add(part)
            else:
                own = parts[0]
        going = self._homeward(sums)
        home = Hop(self.transport, going)
        return self._meet(share, columns[0].here, Returning(home, own, going))

    def _meet(self, share: Share, columns: Tensor, home: Returning) -> Returning:
        """The share of the rank opposite, with an even number of ranks, while the others' sums travel home."""
        if not self._opposite:
            return home
        peer = self._at(self._opposite)
        last = Sums(self.layout, self.accumulator, peer, peer)
        last.add(self.shared(share, self.block(peer, columns)))
        return Returning(Hop(self.transport, [last]), home.whole(), [last])

    def _homeward(self, sums: list[Sums]) -> list[Sums]:
        """The sums, addressed to the owners of the columns that were visited last."""
        below, above = self._at(-self._half), self._at(self._half)
        for one, (owner, visitor) in zip(sums, ((below, above), (above, below)), strict=True):
            one.to, one.source = owner, visitor
        return sums if self._half else []

    def _columns(self) -> tuple[Relay, Relay]:
        filled = self.layout.filled(self.mine)
        up, down = self._ways()
        return Relay(*up, filled), Relay(*down, filled)

    def _moving(self, step: int, columns: tuple[Relay, Relay]) -> list[Mover]:
        if step < self._half:
            return [*columns]
        # Two ranks share one link: halves would be two messages where one does.
        cut = self.layout.most // 2 if self._half else self.layout.most
        return [Meeting(*columns, cut)] if self._opposite else []

    def _visitors(self, step: int, columns: tuple[Relay, Relay]) -> list[Block]:
        """This rank's own block at first, then one from below and one from above."""
        places = (-step, step) if step else (0,)
        return [self.block(self._at(place), way.here) for place, way in zip(places, columns, strict=False)]

    def _ways(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Whom to give to and whom to take from: upwards, downwards."""
        below, above = self._at(-1), self._at(1)
        return (above, below), (below, above)

    def _at(self, distance: int) -> int:
        return (self.transport.rank + distance) % self.transport.size

    @property
    def _half(self) -> int:
        """Full hops in each direction."""
        return (self.transport.size - 1) // 2

    @property
    def _opposite(self) -> int:
        """Distance of the rank opposite; 0 where there is none."""
        return 0 if self.transport.size % 2 else self.transport.size // 2


class Bidirectional(Exchange):
    """The exchange of a run on few ranks in a mesh of links, such as PCIe; a switched network gains latency only."""

    trip = BothWays
