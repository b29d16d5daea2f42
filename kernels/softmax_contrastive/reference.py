"""Obviously right and never optimized: holds all logits, lets autograd differentiate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.kernels.tiling import full_precision, wide


class Sums(NamedTuple):
    """What a block of columns contributes."""

    row_sums: Tensor
    """[B]"""
    column_sums: Tensor
    """[M]"""
    positives: Tensor
    """[B] logits of the pairs, 0 where the block does not hold the partner."""


def softmax_contrastive(
    rows: Tensor, columns: Tensor, scale: Tensor, shift: Tensor, column_shift: Tensor | None, offset: int
) -> Sums:
    with full_precision(rows.device):
        logits = wide(scale) * wide(rows) @ wide(columns).T
    by_row = shift.detach() if column_shift is None else shift.detach()[:, None]
    by_column = shift.detach() if column_shift is None else column_shift.detach()
    own = torch.arange(len(rows), device=rows.device) + offset
    held = (own >= 0) & (own < len(columns))
    positives = torch.zeros_like(logits[:, 0])
    positives[held] = logits[held, own[held]]
    return Sums((logits - by_row).exp().sum(1), (logits - by_column).exp().sum(0), positives)


@torch.no_grad()
def softmax_maxima(rows: Tensor, columns: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    with full_precision(rows.device):
        logits = wide(scale) * wide(rows) @ wide(columns).T
    return logits.amax(1), logits.amax(0)
