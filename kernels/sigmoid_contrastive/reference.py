"""Obviously right and never optimized: holds all logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.kernels.pairing import Pairing
from pretrain.kernels.sigmoid_contrastive.loss import Swept
from pretrain.kernels.softmax_contrastive.reference import masks
from pretrain.kernels.tiling import full_precision, wide


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
    with full_precision(rows.device):
        logits = wide(scale) * (wide(rows) @ wide(columns).T) + wide(bias)
        positive, left_out = masks(logits, pairing)
        losses = -F.logsigmoid(torch.where(positive, logits, -logits)).masked_fill(left_out, 0)
        d_logits = torch.where(positive, -torch.sigmoid(-logits), torch.sigmoid(logits)).masked_fill(left_out, 0)
        if d_rows is not None:
            d_rows += d_logits @ wide(columns)
        d_columns = d_logits.T @ wide(rows) if need_columns else None
    return Swept(losses.sum(), d_logits.sum() if need_bias else None, d_columns)
