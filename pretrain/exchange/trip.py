"""One batch's columns on their way to all ranks, and their gradient on its way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.exchange.layout import Layout
from pretrain.exchange.transport import Transport, Work
from pretrain.kernels.columns import Block, Pending, Share
from pretrain.kernels.dispatch import Impl
from pretrain.kernels.pairing import Span


@dataclass(frozen=True)
class Options:
    """What a run may choose about its exchange; it changes speed, memory and rounding, never what is computed."""

    products: torch.dtype | None = None
    """dtype in which features travel and are multiplied; None: their own."""
    gradients: torch.dtype | None = None
    """dtype of the gradients' products where kernels are fused; None: that of the features' products."""
    impl: Impl = "auto"
    """Form of the kernels."""
    accumulators: torch.dtype | None = None
    """dtype in which column gradients travel and are added up; None: fp32 (fp64 for fp64)."""
    slices: int = 4
    """Into how many pieces `streamed` cuts the columns."""
    node_size: int | None = None
    """Ranks that share a node, consecutive in rank order, for `hierarchical`; None: as the launcher says."""
    checks: float = 1
    """How many batches the ranks compare before they exchange anything; inf: every one, for callers whose batches are
    not equal by construction."""


@dataclass
class Trip(ABC):
    """One batch's columns on their way: `kernels.columns.Columns`. One class for each exchange."""

    mine: Tensor
    """[b, D] this rank's columns, detached, in the dtype in which they travel."""
    layout: Layout
    transport: Transport
    options: Options
    lane: Lane | None = field(default=None, kw_only=True)
    """Where a gradient may be handed on before it has arrived; None: it may not."""

    @property
    def count(self) -> int:
        return self.layout.total

    @abstractmethod
    def blocks(self) -> Iterator[Block]: ...

    @abstractmethod
    def collect(self, share: Share) -> Pending: ...

    def block(self, owner: int, filled: Tensor) -> Block:
        """A rank's columns, [most, D] as they travelled."""
        part, partners = self.layout.of(owner), len(self.mine) if owner == self.layout.rank else 0
        return Block(filled[: self.layout.counts[owner]], part, Span(0, 0, partners))

    def shared(self, share: Share, block: Block) -> Tensor:
        """share(block), without asking a kernel about a block of nothing."""
        if len(block.columns):
            return share(block)
        return block.columns.to(torch.promote_types(block.columns.dtype, torch.float32))

    def own(self, values: Tensor) -> Tensor:
        return values[self.layout.own]

    def spread(self, values: Tensor) -> Tensor:
        rows = self.layout.filled(values)
        gathered = rows.new_empty(self.transport.size * len(rows), *rows.shape[1:])
        self.transport.all_gather(gathered, rows).wait()
        return self.layout.packed(gathered)

    def sum(self, partial: Tensor) -> Tensor:
        total = partial.clone(memory_format=torch.contiguous_format)
        self.transport.all_reduce(total).wait()
        return total

    def max(self, value: Tensor) -> Tensor:
        largest = value.clone(memory_format=torch.contiguous_format)
        self.transport.all_reduce(largest, largest=True).wait()
        return largest

    @property
    def accumulator(self) -> torch.dtype:
        """dtype in which gradients travel."""
        return self.options.accumulators or torch.promote_types(self.mine.dtype, torch.float32)


def occupied(blocks: Iterable[Block]) -> Iterator[Block]:
    """Without those that hold no column, where a rank has no rows."""
    return (block for block in blocks if len(block.columns))


@dataclass
class Arriving:
    """A gradient that comes back to its owner: `kernels.columns.Pending`."""

    trip: Trip
    work: Work
    gradient: Tensor
    """[most, D]"""
    held: object = None
    """What must live until it has arrived."""

    def take(self, factor: Tensor, keep: bool = False) -> Tensor:
        rows = self.gradient[: len(self.trip.mine)]
        if self.trip.lane is not None:
            self.trip.lane.expect(self.work, factor, keep)
            return rows
        self.work.wait()
        self.held = None
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows * factor if keep else rows.mul_(factor)


class Lane:
    """A way on which a gradient may reach its owner after it was handed over; whoever takes it off waits for it."""

    def __init__(self) -> None:
        self._coming: tuple[Work, Tensor, bool] | None = None

    def expect(self, work: Work, factor: Tensor, keep: bool) -> None:
        """A gradient under way, what it is to be multiplied by once it is there, and whether it is needed again."""
        self._coming = (work, factor, keep)

    def arrived(self, gradient: Tensor) -> Tensor:
        """The gradient that was handed over, as it is meant."""
        if self._coming is None:
            return gradient
        (work, factor, keep), self._coming = self._coming, None
        work.wait()
        return gradient * factor if keep else gradient.mul_(factor)
