"""The same in tiles: one exponential per logit and sweep, a workspace of two tiles, logits recomputed in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels.pairing import Pairing
from pretrain.kernels.softmax_contrastive.statistics import Shifts, Sums, Weights
from pretrain.kernels.tiling import full_precision, products, wide


def sums(rows: Tensor, columns: Tensor, scale: Tensor, shifts: Shifts, pairing: Pairing) -> Sums:
    scaled, columns = wide(rows) * scale, wide(columns)
    by_row, by_column, positives = (scaled.new_zeros(len(x)) for x in (rows, columns, rows))
    extra = scaled.new_zeros(len(columns)) if pairing.duplicates == "positives" else None
    found = Sums(by_row, by_column, positives, extra)
    with full_precision(rows.device):
        for r, c, tile in products(scaled, columns):
            _take_positives(found, tile, r, c, pairing)
            if shifts.column is None:
                tile.sub_(shifts.row).exp_()
                by_row[r] += tile.sum(1)
            else:
                by_row[r] += (tile - shifts.row[r, None]).exp_().sum(1)
                tile.sub_(shifts.column[c]).exp_()
            by_column[c] += tile.sum(0)
    return found


def maxima(rows: Tensor, columns: Tensor, scale: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    scaled, columns = wide(rows) * scale, wide(columns)
    by_row, by_column = (scaled.new_full((len(x),), -torch.inf) for x in (rows, columns))
    with full_precision(rows.device):
        for r, c, tile in products(scaled, columns):
            _leave_out(tile, r, c, pairing)
            by_row[r] = torch.maximum(by_row[r], tile.amax(1))
            by_column[c] = torch.maximum(by_column[c], tile.amax(0))
    return by_row, by_column


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
    """The pairs' share is taken off in fp32, inside the tile, before the products: near convergence little else is."""
    rows, columns = wide(rows), wide(columns)
    d_columns = torch.zeros_like(columns) if need_columns else None
    with full_precision(rows.device):
        for r, c, tile in products(rows * scale, columns):
            _leave_out(tile, r, c, pairing)
            _to_gradient(tile, r, c, shifts, weights)
            _give_positives(tile, r, c, pairing, weights)
            if d_rows is not None:
                d_rows[r].addmm_(tile, columns[c])
            if d_columns is not None:
                d_columns[c].addmm_(tile.t(), rows[r])
    return d_columns


def _to_gradient(tile: Tensor, r: slice, c: slice, shifts: Shifts, weights: Weights) -> None:
    """Logits -> exp(logit - shift) (row + column)."""
    if shifts.column is None:
        tile.sub_(shifts.row).exp_().mul_(weights.row[r, None] + weights.column[c])
        return
    row_part = (tile - shifts.row[r, None]).exp_().mul_(weights.row[r, None])
    tile.sub_(shifts.column[c]).exp_().mul_(weights.column[c]).add_(row_part)


def _take_positives(found: Sums, tile: Tensor, r: slice, c: slice, pairing: Pairing) -> None:
    """Add the logits of a tile's positives to their sums, and leave out what counts for nothing."""
    span = pairing.span.within(r, c)
    own, entries = slice(span.row, span.row + span.count), span.entries(tile)
    found.positives[r][own] += entries
    if found.column_positives is None:
        _leave_out(tile, r, c, pairing)
        return
    found.column_positives[c][span.column : span.column + span.count] += entries
    if (more := pairing.duplicated(r, c)) is not None:
        found.positives[r].index_add_(0, more[0], tile[more])
        found.column_positives[c].index_add_(0, more[1], tile[more])


def _give_positives(tile: Tensor, r: slice, c: slice, pairing: Pairing, weights: Weights) -> None:
    span, positive = pairing.span.within(r, c), weights.positive[r]
    entries, own = span.entries(tile), slice(span.row, span.row + span.count)
    entries.sub_(positive[own])
    if weights.column_positive is None:
        return
    by_column = weights.column_positive[c]
    entries.sub_(by_column[span.column : span.column + span.count])
    if (more := pairing.duplicated(r, c)) is not None:
        tile[more] -= positive[more[0]] + by_column[more[1]]


def _leave_out(tile: Tensor, r: slice, c: slice, pairing: Pairing) -> None:
    if pairing.duplicates == "ignore" and (more := pairing.duplicated(r, c)) is not None:
        tile[more] = -torch.inf
