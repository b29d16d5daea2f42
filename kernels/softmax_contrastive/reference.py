"""Obviously right and never optimized: holds all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels.pairing import Pairing
from pretrain.kernels.softmax_contrastive.statistics import Shifts, Sums, Weights
from pretrain.kernels.tiling import full_precision, wide


def sums(rows: Tensor, columns: Tensor, scale: Tensor, shifts: Shifts, pairing: Pairing) -> Sums:
    logits = _logits(rows, columns, scale)
    positive, left_out = masks(logits, pairing)
    by_row, by_column = _exponentials(logits, shifts, left_out)
    found = torch.where(positive, logits, 0)
    extra = found.sum(0) if pairing.duplicates == "positives" else None
    return Sums(by_row.sum(1), by_column.sum(0), found.sum(1), extra)


def maxima(rows: Tensor, columns: Tensor, scale: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    logits = _logits(rows, columns, scale)
    logits = logits.masked_fill(masks(logits, pairing)[1], -torch.inf)
    return logits.amax(1), logits.amax(0)


def gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    shifts: Shifts,
    pairing: Pairing,
    weights: Weights,
    d_rows: Tensor | None,
    need_columns: bool,
    gradient_dtype: torch.dtype | None = None,
) -> Tensor | None:
    logits = _logits(rows, columns, scale)
    positive, left_out = masks(logits, pairing)
    by_row, by_column = _exponentials(logits, shifts, left_out)
    extra = 0 if weights.column_positive is None else weights.column_positive
    d_logits = by_row * weights.row[:, None] + by_column * weights.column
    d_logits -= torch.where(positive, weights.positive[:, None] + extra, 0)
    with full_precision(rows.device):
        if d_rows is not None:
            d_rows += d_logits @ wide(columns)
        return d_logits.T @ wide(rows) if need_columns else None


def masks(logits: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """[B, M] bool: which entries are positives, and which are left out of every sum."""
    positive = torch.zeros_like(logits, dtype=torch.bool)
    pairing.span.entries(positive).fill_(True)
    left_out = torch.zeros_like(positive)
    if pairing.row_ids is not None and pairing.column_ids is not None:
        equal = pairing.row_ids[:, None] == pairing.column_ids
        left_out = equal & ~positive if pairing.duplicates == "ignore" else left_out
        positive = equal | positive if pairing.duplicates == "positives" else positive
    return positive, left_out


def _logits(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    with full_precision(rows.device):
        return wide(scale) * (wide(rows) @ wide(columns).T)


def _exponentials(logits: Tensor, shifts: Shifts, left_out: Tensor) -> tuple[Tensor, Tensor]:
    by_row = shifts.row if shifts.column is None else shifts.row[:, None]
    by_column = shifts.row if shifts.column is None else shifts.column
    return (logits - by_row).exp().masked_fill(left_out, 0), (logits - by_column).exp().masked_fill(left_out, 0)
