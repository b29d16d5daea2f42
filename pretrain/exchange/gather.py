"""All columns at once: one all-gather forward, one reduce-scatter backward. Memory O(N D)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.exchange.base import Block

Group = dist.ProcessGroup | None

# torch 2.13 renames both and warns about the names that every earlier release has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gather:
    """The exchange of a run on a few to a few thousand ranks."""

    def __init__(self, rank: int, size: int, group: Group = None, checked: bool = False) -> None:
        """Take part in the collectives of a process group.

        Args:
            rank: this process in the group.
            size: of the group.
            group: default: all processes.
            checked: compare the ranks' shapes before every gather, which costs one small collective and, on a GPU, a
                wait for it; for callers whose batches are not equal by construction.
        """
        self.rank, self.size, self.group, self.checked = rank, size, group, checked

    def blocks(self, columns: Tensor) -> Iterator[Block]:
        """One block with the columns of all ranks.

        Raises:
            ValueError: on every rank, if `checked` and the ranks do not hold equally many rows of one shape.
        """
        yield Block(self.gather(columns), 0)

    def gather(self, columns: Tensor) -> Tensor:
        """As `Exchange.gather`; raises as `blocks` does."""
        if self.size == 1:
            return columns
        if self.checked:
            self._check(columns)
        gathered: Tensor = _GatherRows.apply(columns, self.size, self.group)  # type: ignore[no-untyped-call]
        return gathered

    def sum(self, partial: Tensor) -> Tensor:
        if self.size == 1:
            return partial
        total: Tensor = _Sum.apply(partial, self.group)  # type: ignore[no-untyped-call]
        return total

    def max(self, value: Tensor) -> Tensor:
        largest = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return largest

    def _check(self, columns: Tensor) -> None:
        own = torch.tensor([len(columns), columns.numel(), columns.element_size()], device=columns.device)
        shapes = own.new_empty(self.size * 3)
        _all_gather(shapes, own, group=self.group)
        found = shapes.view(self.size, 3).tolist()
        if any(shape != found[0] for shape in found):
            rows, values, widths = (list(column) for column in zip(*found, strict=True))
            raise ValueError(
                f"every rank must bring equally many rows of one width and dtype; rows by rank: {rows},"
                f" values: {values}, bytes each: {widths}. Drop or even out the last batch"
            )


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks in rank order; each owner receives the sum over ranks of its rows' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, size: int, group: Group) -> Tensor:
        ctx.size, ctx.group = size, group
        gathered = rows.new_empty((size * len(rows), *rows.shape[1:]))
        _all_gather(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad.new_empty((len(grad) // ctx.size, *grad.shape[1:]))
        _reduce_scatter(own, grad.contiguous(), group=ctx.group)
        return own, None, None


class _Sum(torch.autograd.Function):
    """Sum over ranks; each rank's term receives the sum over ranks of the gradients of what they made of the total."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
