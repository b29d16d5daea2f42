"""Obviously right and never optimized: holds all logits, lets autograd differentiate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.kernels.tiling import full_precision, wide


def sigmoid_contrastive(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    with full_precision(rows.device):
        logits = wide(scale) * wide(rows) @ wide(columns).T + wide(bias)
    own = torch.arange(len(rows), device=rows.device) + offset
    is_pair = own[:, None] == torch.arange(len(columns), device=rows.device)
    return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum()
