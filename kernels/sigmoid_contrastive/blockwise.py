"""The same in tiles, gradients included: their upstream factor is one scalar, so backward only multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.kernels.tiling import full_precision, partners, products, wide

LINEAR_FROM = 40.0
"""softplus(z) is z to the last bit of fp64 from here on."""


def sigmoid_contrastive(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    grad_enabled = torch.is_grad_enabled()
    total: Tensor = _Total.apply(rows, columns, scale, bias, offset, grad_enabled)  # type: ignore[no-untyped-call]
    return total


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, grad_enabled: bool
    ) -> Tensor:
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:4]]
        total, *grads = _sweep(wide(rows), wide(columns), scale, bias, offset, needs)
        inputs = (rows, columns, scale, bias)
        kept = [grad.to(x.dtype) if need else None for grad, x, need in zip(grads, inputs, needs, strict=True)]
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = (grad if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None


def _sweep(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int, needs: list[bool]
) -> tuple[Tensor, ...]:
    """The total and its gradients with respect to rows, columns, scale and bias; zeros where not needed."""
    need_rows, need_columns, need_scale, _ = needs
    need_rows = need_rows or (need_scale and not need_columns)  # scale takes its gradient from either side
    d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    losses, d_biases = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    with full_precision(rows.device):
        for r, c, tile in products(rows * scale, columns):
            _, entries = partners(tile.add_(bias), r, c, offset)
            entries.neg_()  # before the softplus: softplus(z) - z would lose what a good pair's small loss is made of
            losses[r] += F.softplus(tile, threshold=LINEAR_FROM).sum(1)
            if not any(needs):
                continue
            tile.sigmoid_()
            entries.neg_()
            d_biases[r] += tile.sum(1)
            if need_rows:
                d_rows[r].addmm_(tile, columns[c])
            if need_columns:
                d_columns[c].addmm_(tile.t(), rows[r])
    d_scale = (rows * d_rows if need_rows else columns * d_columns).sum()
    return losses.sum(), d_rows.mul_(scale), d_columns.mul_(scale), d_scale, d_biases.sum()
