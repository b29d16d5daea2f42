"""The same in tiles: a workspace of two tiles, and nothing is computed twice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.kernels.pairing import Pairing
from pretrain.kernels.sigmoid_contrastive.loss import Swept
from pretrain.kernels.tiling import full_precision, products, wide

LINEAR_FROM = 40.0
"""softplus(z) is z to the last bit of fp64 from here on."""


def sweep(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairing: Pairing,
    d_rows: Tensor | None,
    need_columns: bool,
    need_bias: bool,
    gradient_dtype: torch.dtype | None = None,
) -> Swept:
    rows, columns = wide(rows), wide(columns)
    d_columns = torch.zeros_like(columns) if need_columns else None
    losses, d_biases = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    with full_precision(rows.device):
        for r, c, tile in products(rows * scale, columns):
            tile.add_(bias)
            _leave_out(tile, r, c, pairing)
            _negate_positives(tile, r, c, pairing)  # before the softplus: softplus(z) - z would lose a good pair's loss
            losses[r] += F.softplus(tile, threshold=LINEAR_FROM).sum(1)
            if d_rows is None and not need_columns and not need_bias:
                continue
            _negate_positives(tile.sigmoid_(), r, c, pairing)
            if need_bias:
                d_biases[r] += tile.sum(1)
            if d_rows is not None:
                d_rows[r].addmm_(tile, columns[c])
            if d_columns is not None:
                d_columns[c].addmm_(tile.t(), rows[r])
    return Swept(losses.sum(), d_biases.sum() if need_bias else None, d_columns)


def _negate_positives(tile: Tensor, r: slice, c: slice, pairing: Pairing) -> None:
    pairing.span.within(r, c).entries(tile).neg_()
    if pairing.duplicates == "positives" and (more := pairing.duplicated(r, c)) is not None:
        tile[more] = -tile[more]


def _leave_out(tile: Tensor, r: slice, c: slice, pairing: Pairing) -> None:
    if pairing.duplicates == "ignore" and (more := pairing.duplicated(r, c)) is not None:
        tile[more] = -torch.inf
