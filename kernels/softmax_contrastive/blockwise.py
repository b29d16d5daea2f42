"""The same in tiles: one exponential per logit and sweep, a workspace of one tile, logits recomputed in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.kernels.softmax_contrastive.reference import Sums
from pretrain.kernels.tiling import full_precision, partners, products, wide


def softmax_contrastive(
    rows: Tensor, columns: Tensor, scale: Tensor, shift: Tensor, column_shift: Tensor | None, offset: int
) -> Sums:
    return Sums(*_Sums.apply(rows, columns, scale, shift, column_shift, offset))  # type: ignore[no-untyped-call]


@torch.no_grad()
def softmax_maxima(rows: Tensor, columns: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scaled, columns = wide(rows) * scale, wide(columns)
    by_row, by_column = (scaled.new_full((len(x),), -torch.inf) for x in (rows, columns))
    with full_precision(rows.device):
        for r, c, tile in products(scaled, columns):
            by_row[r] = torch.maximum(by_row[r], tile.amax(1))
            by_column[c] = torch.maximum(by_column[c], tile.amax(0))
    return by_row, by_column


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, shift: Tensor, column_shift: Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, columns, scale, shift, column_shift)
        ctx.offset = offset
        scaled, columns = wide(rows) * scale, wide(columns)
        row_sums, column_sums, positives = (scaled.new_zeros(len(x)) for x in (rows, columns, rows))
        with full_precision(rows.device):
            for r, c, tile in products(scaled, columns):
                own, entries = partners(tile, r, c, offset)
                positives[own] = entries
                if column_shift is None:
                    tile.sub_(shift).exp_()
                    row_sums[r] += tile.sum(1)
                else:
                    row_sums[r] += (tile - shift[r, None]).exp_().sum(1)
                    tile.sub_(column_shift[c]).exp_()
                column_sums[c] += tile.sum(0)
        return row_sums, column_sums, positives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_row: Tensor, by_column: Tensor, by_positive: Tensor) -> tuple[Tensor | None, ...]:
        """d loss / d logit = e (by_row + by_column) + by_positive on the partners, all in fp32 before the products."""
        narrow_rows, narrow_columns, scale, shift, column_shift = ctx.saved_tensors
        rows, columns = wide(narrow_rows), wide(narrow_columns)
        need_rows, need_columns, need_scale = ctx.needs_input_grad[:3]
        need_rows_sum = need_rows or not need_columns  # scale takes its gradient from either side
        d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        with full_precision(rows.device):
            for r, c, tile in products(rows * scale, columns):
                if column_shift is None:
                    tile.sub_(shift).exp_().mul_(by_row[r, None] + by_column[c])
                else:
                    row_part = (tile - shift[r, None]).exp_().mul_(by_row[r, None])
                    tile.sub_(column_shift[c]).exp_().mul_(by_column[c]).add_(row_part)
                own, entries = partners(tile, r, c, ctx.offset)
                entries.add_(by_positive[own])
                if need_rows_sum:
                    d_rows[r].addmm_(tile, columns[c])
                if need_columns:
                    d_columns[c].addmm_(tile.t(), rows[r])
        return (
            d_rows.mul(scale).to(narrow_rows.dtype) if need_rows else None,
            d_columns.mul(scale).to(narrow_columns.dtype) if need_columns else None,
            _scale_gradient(rows, d_rows, columns, d_columns, need_rows_sum).to(scale.dtype) if need_scale else None,
            *(None, None, None),
        )


def _scale_gradient(rows: Tensor, d_rows: Tensor, columns: Tensor, d_columns: Tensor, by_rows: bool) -> Tensor:
    """Sum of d logit * cosine over all pairs, in O(B D): <row, d_row> adds up to it, and so does <column, d_column>."""
    return (rows * d_rows if by_rows else columns * d_columns).sum()
