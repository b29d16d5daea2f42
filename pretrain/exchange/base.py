"""What an exchange promises, and what all of them share.

The contract: an objective returns the mean over this rank's rows; the exchange returns each column's gradient, summed
over ranks, to its owner; the engine averages over ranks. Then W ranks equal one process.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.exchange.layout import Layout, compare
from pretrain.exchange.transport import Transport
from pretrain.exchange.trip import Options, Trip


class Exchange(ABC):
    """A way to the columns of all ranks, in rank order: the columns of rank 0 first."""

    trip: ClassVar[type[Trip]]

    def __init__(self, transport: Transport, options: Options | None = None) -> None:
        self.transport, self.options = transport, options or Options()
        self._checks = self.options.checks
        self._layout: Layout | None = None

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def size(self) -> int:
        return self.transport.size

    @property
    def sent(self) -> int:
        """Bytes that left this rank so far."""
        return self.transport.sent

    @property
    def checking(self) -> bool:
        """Whether the next batch is compared between ranks before anything else is sent."""
        return self._checks > 0

    def announce(self, columns: Tensor, losses: int = 1) -> Tensor:
        """Say early which columns `bring` will be asked for, so that they may travel meanwhile.

        Args:
            columns: [b, D] as they will be given to `bring`.
            losses: how many losses will take their gradient from them.

        Returns:
            The same values: what to go on with.
        """
        return columns

    def bring(self, columns: Tensor, problem: str | None = None) -> Trip:
        """This rank's columns to all ranks, and those of all ranks to this one. Collective.

        Args:
            columns: [b, D]; b may differ between ranks where every batch is checked.
            problem: what is wrong with this rank's batch, if anything.

        Raises:
            ValueError: on every rank, while batches are checked: some rank has a problem, or the ranks' widths or
                dtypes differ, or nobody has any rows. On this rank alone afterwards.
        """
        layout = self.agree(columns, problem)
        return self.depart(self.packaged(columns), layout)

    def depart(self, columns: Tensor, layout: Layout) -> Trip:
        """Columns that are packaged, and agreed on, at the start of their way."""
        return self.trip(columns, layout, self.transport, self.options)

    def receiver(self, columns: Tensor, trip: Trip) -> tuple[Tensor, Trip]:
        """What takes a loss's gradient with respect to its columns, and the trip that brings it there."""
        return columns, trip

    def packaged(self, columns: Tensor) -> Tensor:
        """Columns as they travel."""
        return columns.detach().to(self.options.products or columns.dtype).contiguous()

    def agree(self, columns: Tensor, problem: str | None = None) -> Layout:
        """Who brings how many columns; errors as `bring` raises them."""
        if self._checks > 0:
            self._checks -= 1
            self._layout = compare(columns, problem, self.transport)
        elif problem is not None:
            raise ValueError(problem)
        if self._layout is None or self._layout.counts[self.rank] != len(columns):
            self._layout = Layout((len(columns),) * self.size, self.rank)
        return self._layout

    def gather(self, columns: Tensor) -> Tensor:
        """[b, ...] of every rank as [N, ...]; differentiable: each owner receives the sum of the gradients of its part.

        For small things (ids, weights) and objectives that need the whole matrix.
        """
        layout = self._layout
        if layout is None or layout.counts[self.rank] != len(columns):
            layout = Layout((len(columns),) * self.size, self.rank)
        gathered: Tensor = _GatherRows.apply(columns, layout, self.transport)  # type: ignore[no-untyped-call]
        return gathered

    def sum(self, partial: Tensor) -> Tensor:
        """Sum over ranks of same-shaped tensors; differentiable: every rank receives the sum of the gradients."""
        total: Tensor = _Sum.apply(partial, self.transport)  # type: ignore[no-untyped-call]
        return total

    def max(self, value: Tensor) -> Tensor:
        """Largest over ranks, elementwise; no gradient."""
        largest = value.detach().clone()
        self.transport.all_reduce(largest, largest=True).wait()
        return largest


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks in rank order; each owner receives the sum over ranks of its rows' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Layout, transport: Transport) -> Tensor:
        ctx.layout, ctx.transport = layout, transport
        own = layout.filled(rows)
        gathered = own.new_empty((transport.size * len(own), *own.shape[1:]))
        transport.all_gather(gathered, own).wait()
        return layout.packed(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = ctx.layout.unpacked(grad)
        own = parts.new_empty((ctx.layout.most, *parts.shape[1:]))
        ctx.transport.reduce_scatter(own, parts).wait()
        return own[: ctx.layout.counts[ctx.layout.rank]], None, None


class _Sum(torch.autograd.Function):
    """Sum over ranks; each rank's term receives the sum over ranks of the gradients of what they made of the total."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, transport: Transport) -> Tensor:
        ctx.transport = transport
        total = partial.clone(memory_format=torch.contiguous_format)
        transport.all_reduce(total).wait()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.transport.all_reduce(total).wait()
        return total, None
