"""The loss as torch sees it: a function of columns that somebody brings, and an operator on columns that are here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.kernels import dispatch
from pretrain.kernels.columns import Columns, Here
from pretrain.kernels.pairing import Duplicates, Span, require_equal
from pretrain.kernels.sigmoid_contrastive.loss import Found, Needs, Sweep
from pretrain.kernels.strips import dtype_of
from pretrain.kernels.tiling import require_finite, wide

NAME = "sigmoid_contrastive"


def sweep(
    rows: Tensor,
    columns: Columns,
    scale: Tensor,
    bias: Tensor,
    duplicates: str,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    impl: str,
    gradient_dtype: str | None,
) -> Sweep:
    """What both ways to call the loss begin with. Raises ValueError where impl cannot run here."""
    form = dispatch.load(NAME, dispatch.choose(NAME, impl, rows, low_precision_only=True))
    kind: Duplicates = duplicates  # type: ignore[assignment]
    detached = (rows.detach(), columns, scale.detach(), bias.detach())
    return Sweep(*detached, kind, row_ids, column_ids, form, dtype_of(gradient_dtype))


class Total(torch.autograd.Function):
    """[] sum over all pairs; gradients are made in forward and held."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, own_columns: Tensor, scale: Tensor, bias: Tensor, swept: Sweep, grad_enabled: bool
    ) -> Tensor:
        needs = Needs(*(grad_enabled and need for need in ctx.needs_input_grad[:4]))
        ctx.found, ctx.needs, ctx.swept = swept.run(needs), needs, swept
        ctx.dtypes = tuple(x.dtype for x in (rows, own_columns, scale, bias))
        ctx.save_for_backward(own_columns, scale)
        total: Tensor = ctx.found.total
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = gradients(ctx.swept, ctx.found, ctx.needs, upstream, *ctx.saved_tensors)
        cast = (g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *cast, None, None


def gradients(
    swept: Sweep, found: Found, needs: Needs, upstream: Tensor, own_columns: Tensor, scale: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of rows, own columns, scale and bias; the scale's is <row, d row> added up, or <column, d column>."""
    upstream, scale = wide(upstream), wide(scale)
    d_rows, pending, d_columns, d_scale = found.rows, found.columns, None, None
    if d_rows is not None and needs.scale:
        d_scale = (wide(swept.rows) * d_rows).sum() * upstream
    if pending is not None and needs.scale and d_rows is None:
        d_columns = pending.take(upstream, keep=True)
        d_scale = (wide(own_columns) * d_columns).sum()
        d_columns.mul_(scale)
    elif pending is not None:
        d_columns = pending.take(scale * upstream, keep=True)
    scaled_rows = d_rows * (scale * upstream) if d_rows is not None and needs.rows else None
    return scaled_rows, d_columns, d_scale, None if found.bias is None else found.bias * upstream


@torch.library.custom_op("pretrain::sigmoid_total", mutates_args=())
def total_here(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    duplicates: str,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    impl: str,
    gradient_dtype: str | None,
    needs: list[bool],
) -> list[Tensor]:
    """The total [], then the gradients that are needed of rows, columns, scale and bias, in fp32 (fp64 for fp64).

    Rounded to 16 bits before they meet their upstream factor, those of a sum over all pairs would overflow.
    """
    require_finite(scale=scale, bias=bias)
    if duplicates != "negatives":
        require_equal(row_ids, column_ids, Span.at(offset, len(rows), len(columns)))
    here, wanted = Here(columns, len(rows), offset), Needs(*needs)
    swept = sweep(rows, here, scale, bias, duplicates, row_ids, column_ids, impl, gradient_dtype)
    found = swept.run(wanted)
    one = torch.ones_like(found.total)
    grads = gradients(swept, found, wanted, one, columns, scale)
    return [found.total, *(g for g in grads if g is not None)]


@total_here.register_fake
def _(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, *rest: Any) -> list[Tensor]:
    inputs = zip((rows, columns, scale, bias), rest[-1], strict=True)
    return [wide(rows[:0]).new_empty(()), *(torch.empty_like(wide(x)) for x, need in inputs if need)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.needs, ctx.dtypes = inputs[-1], [x.dtype for x in inputs[:4]]


def _differentiate(ctx: Any, upstreams: list[Tensor]) -> tuple[Tensor | None, ...]:
    held, upstream = iter(ctx.saved_tensors), upstreams[0]
    wanted = zip(ctx.needs, ctx.dtypes, strict=True)
    return *((next(held) * upstream).to(dtype) if need else None for need, dtype in wanted), *(None,) * 7


total_here.register_autograd(_differentiate, setup_context=_keep)
