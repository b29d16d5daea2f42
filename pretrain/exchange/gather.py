"""All columns at once: one all-gather, one reduce-scatter, each hidden behind a tower. Memory O(N D).

Announced before the image tower, the columns travel while it computes; their gradient goes back while the image tower's
own backward runs. Each rank sends (W - 1) b D elements forward and as many, as fp32, backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.exchange.base import Exchange
from pretrain.exchange.layout import compare
from pretrain.exchange.transport import Work
from pretrain.exchange.trip import Arriving, Lane, Trip
from pretrain.kernels.columns import Block, Share
from pretrain.kernels.pairing import Span


@dataclass
class Cargo:
    """The columns of all ranks, from the moment they leave."""

    work: Work
    gathered: Tensor
    """[W * most, D]"""
    held: Tensor
    """What is being sent."""


@dataclass
class Together(Trip):
    """Everything in one block."""

    cargo: list[Cargo] = field(default_factory=list)

    def start(self) -> None:
        """Send and receive, without waiting."""
        own = self.layout.filled(self.mine)
        gathered = own.new_empty(self.transport.size * len(own), *own.shape[1:])
        self.cargo.append(Cargo(self.transport.all_gather(gathered, own), gathered, own))

    def blocks(self) -> Iterator[Block]:
        if not self.cargo:
            self.start()
        self.cargo[0].work.wait()
        own = self.layout.own
        span = Span(0, own.start, own.stop - own.start)
        yield Block(self.layout.packed(self.cargo[0].gathered), slice(0, self.count), span)

    def collect(self, share: Share) -> Arriving:
        parts = self.layout.unpacked(share(next(self.blocks()))).to(self.accumulator)
        own = parts.new_empty(self.layout.most, *parts.shape[1:])
        return Arriving(self, self.transport.reduce_scatter(own, parts), own, held=parts)


class Gather(Exchange):
    """The exchange of a run on a few to a few thousand ranks."""

    trip = Together

    def announce(self, columns: Tensor, losses: int = 1) -> Tensor:
        # What is wrong with the rest of the batch is not known yet: `bring` still compares the ranks, once more.
        layout = compare(columns, None, self.transport) if self.checking else self.agree(columns)
        trip = Together(self.packaged(columns), layout, self.transport, self.options)
        trip.start()
        lanes = [Lane() for _ in range(losses)]
        outputs = _Announced.apply(columns, lanes)  # type: ignore[no-untyped-call]
        self._announced = (outputs[0], trip, list(zip(lanes, outputs[1:], strict=True)))
        text: Tensor = outputs[0]
        return text

    def bring(self, columns: Tensor, problem: str | None = None) -> Trip:
        announced, trip, _ = self._announced
        if announced is not columns or trip is None:
            return super().bring(columns, problem)
        self.agree(columns, problem)
        return trip

    def receiver(self, columns: Tensor, trip: Trip) -> tuple[Tensor, Trip]:
        announced, own, lanes = self._announced
        if announced is not columns or own is not trip or not torch.is_grad_enabled():
            return columns, trip
        if trip.accumulator != columns.dtype:  # a gradient that is yet to be cast must be there
            return columns, trip
        lane, tensor = lanes.pop()
        if not lanes:
            self._announced = (None, None, [])
        return tensor, replace(trip, lane=lane)

    _announced: tuple[Tensor | None, Trip | None, list[tuple[Lane, Tensor]]] = (None, None, [])


class _Announced(torch.autograd.Function):
    """The same columns, once for ordinary use and once for each lane.

    A lane's gradient may still be travelling when it is handed over here. Being older than every node of the image
    tower, this node runs after all of them: that is what the travelling hides behind. Lanes are apart from each other
    and from ordinary use, because autograd adds up what meets on one output, and it knows nothing of travelling.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, lanes: list[Lane]) -> tuple[Tensor, ...]:
        ctx.lanes = lanes
        ctx.set_materialize_grads(False)
        return columns.view_as(columns), *(columns.view_as(columns) for _ in lanes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ordinary: Tensor | None, *late: Tensor | None) -> tuple[Tensor | None, None]:
        pairs = zip(ctx.lanes, late, strict=True)
        found = [lane.arrived(gradient) for lane, gradient in pairs if gradient is not None]
        found += [] if ordinary is None else [ordinary]
        return (torch.stack(found).sum(0) if len(found) > 1 else found[0] if found else None), None
