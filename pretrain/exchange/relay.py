"""What exchanges that go in hops share: tensors that ranks hand on, in buffers that take turns.

A buffer is written to again only after the hop that sent it was waited for, and a hop is posted before the block that
it hides behind is computed: NCCL's stream waits, at that moment, for whatever was computed until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pretrain.exchange.layout import Layout
from pretrain.exchange.transport import Transport, Work


class Buffers:
    """Two pieces of memory that take turns: one may still be read or sent while the other fills."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def next(self, rows: int, like: Tensor) -> Tensor:
        """[rows, ...] of `like`'s other sizes, dtype and device; made at first use. `rows` never grows."""
        if len(self._held) < 2:
            self._held.append(like.new_empty(rows, *like.shape[1:]))
        else:
            self._held.reverse()
        return self._held[-1][:rows]


class Pass(NamedTuple):
    """One message out and one in."""

    given: Tensor
    to: int
    taken: Tensor
    source: int


class Mover(Protocol):
    """What takes part in a hop."""

    def passes(self) -> list[Pass]: ...

    def arrived(self) -> None: ...


@dataclass
class Relay:
    """A tensor that every rank hands on to the next."""

    to: int
    source: int
    here: Tensor
    """[most, D] what lies here now; the first is never written to."""
    coming: Tensor | None = None
    """What the hop under way brings."""
    buffers: Buffers = field(default_factory=Buffers)

    def passes(self) -> list[Pass]:
        self.coming = self.buffers.next(len(self.here), self.here)
        return [Pass(self.here, self.to, self.coming, self.source)]

    def arrived(self) -> None:
        if self.coming is not None:
            self.here, self.coming = self.coming, None


class Sums(Relay):
    """A gradient that travels from one visitor of its columns to the next and grows on the way."""

    def __init__(self, layout: Layout, dtype: torch.dtype, to: int, source: int) -> None:
        super().__init__(to, source, torch.empty(0))
        self._layout, self._dtype, self._begun = layout, dtype, False

    def add(self, part: Tensor) -> None:
        """What the rows here add to the gradient of the columns it belongs to, [n, D] fp32 or fp64, the caller's own;
        rounded to the dtype in which it travels only as part of the sum."""
        if self._begun:
            self.here[: len(part)].add_(part)
        else:
            self.here, self._begun = self._layout.filled(part.to(self._dtype)), True


class Hop:
    """One batch of messages; once waited for, what came is here."""

    def __init__(self, transport: Transport, movers: Sequence[Mover]) -> None:
        passes = [one for mover in movers for one in mover.passes() if len(one.given)]
        self._movers: Sequence[Mover] = movers
        sends, receives = [(one.given, one.to) for one in passes], [(one.taken, one.source) for one in passes]
        self._work: Work | None = transport.swap(sends, receives) if passes else None

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        for mover in self._movers:
            mover.arrived()
        self._movers, self._work = (), None


@dataclass
class Returning:
    """A gradient whose owner's share never left, the others' being on their way: `kernels.columns.Pending`."""

    hop: Hop
    own: Tensor
    """[b, D] fp32 (fp64 for fp64) what this rank's rows add; becomes the whole."""
    sums: Sequence[Sums]
    """What the hop brings."""

    def whole(self) -> Tensor:
        """[b, D] once everything is here."""
        self.hop.wait()
        for arrived in self.sums:
            self.own.add_(arrived.here[: len(self.own)])
        self.sums = ()
        return self.own

    def take(self, factor: Tensor, keep: bool = False) -> Tensor:
        return self.whole() * factor if keep else self.whole().mul_(factor)
