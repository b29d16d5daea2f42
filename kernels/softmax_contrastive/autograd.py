"""The loss as torch sees it: a function of columns that somebody brings, and an operator on columns that are here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.kernels import dispatch
from pretrain.kernels.columns import Columns, Here
from pretrain.kernels.pairing import Duplicates, Span, require_equal
from pretrain.kernels.softmax_contrastive.loss import State, Sweep
from pretrain.kernels.softmax_contrastive.statistics import Shifts
from pretrain.kernels.strips import dtype_of
from pretrain.kernels.tiling import require_finite, wide

NAME = "softmax_contrastive"


def sweep(
    rows: Tensor,
    columns: Columns,
    scale: Tensor,
    duplicates: str,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    impl: str,
    gradient_dtype: str | None,
) -> Sweep:
    """What both ways to call the loss begin with. Raises ValueError where impl cannot run here."""
    form = dispatch.load(NAME, dispatch.choose(NAME, impl, rows, low_precision_only=True))
    kind: Duplicates = duplicates  # type: ignore[assignment]
    return Sweep(rows.detach(), columns, scale.detach(), kind, row_ids, column_ids, form, dtype_of(gradient_dtype))


class Losses(torch.autograd.Function):
    """[B] losses of a sweep; the gradient of the columns goes to whoever owns them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, own_columns: Tensor, scale: Tensor, swept: Sweep) -> Tensor:
        ctx.save_for_backward(own_columns, scale)
        losses, ctx.state = swept.losses()
        ctx.swept, ctx.dtypes = swept, (rows.dtype, own_columns.dtype, scale.dtype)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        own_columns, scale = ctx.saved_tensors
        grads = gradients(ctx.swept, ctx.state, upstream, own_columns, scale, ctx.needs_input_grad[:3])
        cast = (g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *cast, None


def gradients(
    swept: Sweep, state: State, upstream: Tensor, own_columns: Tensor, scale: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With respect to rows, own columns and scale, in fp32 (fp64 for fp64).

    The sum of d logit * cosine over all pairs is the scale's gradient; <row, d row> adds up to it, and so does
    <column, d column>: O(B D) either way.
    """
    need_rows, need_columns, need_scale = needs
    by_rows = need_rows or (need_scale and not need_columns)
    d_rows, pending = swept.gradients(upstream, state, by_rows, need_columns)
    d_scale = (wide(swept.rows) * d_rows).sum() if d_rows is not None and need_scale else None
    d_columns = None
    if pending is not None and need_scale and d_rows is None:
        d_columns = pending.take(torch.ones_like(wide(scale)))
        d_scale = (wide(own_columns) * d_columns).sum()
        d_columns.mul_(scale)
    elif pending is not None:
        d_columns = pending.take(wide(scale))
    return d_rows.mul_(scale) if d_rows is not None and need_rows else None, d_columns, d_scale


@torch.library.custom_op("pretrain::softmax_losses", mutates_args=())
def losses_here(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    offset: int,
    duplicates: str,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    impl: str,
    gradient_dtype: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [B]; then the state: sums [B], [M], shifts [B], [M], whether they differ [] (on the CPU), counts [2, B]"""
    require_finite(scale=scale)
    if duplicates != "negatives":
        require_equal(row_ids, column_ids, Span.at(offset, len(rows), len(columns)))
    swept = sweep(rows, Here(columns, len(rows), offset), scale, duplicates, row_ids, column_ids, impl, gradient_dtype)
    losses, state = swept.losses()
    row, column = state.shifts
    shifts = (row, column) if column is not None else (row.expand(len(rows)).clone(), row.expand(len(columns)).clone())
    counts = rows.new_ones(2, len(rows), dtype=torch.int64) if state.counts is None else state.counts
    return losses, state.row_sums, state.column_sums, *shifts, torch.tensor(column is not None), counts


@losses_here.register_fake
def _(rows: Tensor, columns: Tensor, *_: Any) -> tuple[Tensor, ...]:
    by_row, by_column = (x.new_empty(len(x), dtype=wide(x[:0]).dtype) for x in (rows, columns))
    tracked, counts = torch.empty((), dtype=torch.bool), rows.new_empty(2, len(rows), dtype=torch.int64)
    return by_row, by_row.clone(), by_column, by_row.clone(), by_column.clone(), tracked, counts


@torch.library.custom_op("pretrain::softmax_gradients", mutates_args=())
def gradients_here(
    upstream: Tensor,
    inputs: list[Tensor],
    saved: list[Tensor],
    offset: int,
    duplicates: str,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    impl: str,
    gradient_dtype: str | None,
    needs: list[bool],
) -> list[Tensor]:
    """Of rows, columns and scale, those that are needed, in the dtype of each."""
    rows, columns, scale = inputs
    swept = sweep(rows, Here(columns, len(rows), offset), scale, duplicates, row_ids, column_ids, impl, gradient_dtype)
    row_sums, column_sums, row_shift, column_shift, tracked, counts = saved
    shifts = Shifts(row_shift, column_shift) if bool(tracked) else Shifts(column_shift[0], None)
    state = State(row_sums, column_sums, shifts, counts if duplicates == "positives" else None)
    grads = gradients(swept, state, upstream, columns, scale, (needs[0], needs[1], needs[2]))
    return [g.to(x.dtype, copy=g is x) for g, x in zip(grads, inputs, strict=True) if g is not None]


@gradients_here.register_fake
def _(upstream: Tensor, inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip(inputs, rest[-1], strict=True) if need]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:], *inputs[5:7])
    ctx.offset, ctx.duplicates, ctx.form = inputs[3], inputs[4], inputs[7:9]


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    given = (ctx.offset, ctx.duplicates, *saved[9:], *ctx.form, needs)
    found = iter(gradients_here(upstream, list(saved[:3]), list(saved[3:9]), *given))
    return *(next(found) if need else None for need in needs), *(None,) * 6


losses_here.register_autograd(_differentiate, setup_context=_keep)
