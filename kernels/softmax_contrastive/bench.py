"""Time of CLIP's loss in the forms that run here: `python -m pretrain.kernels.softmax_contrastive.bench`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pretrain.kernels import loss_bench
from pretrain.kernels.dispatch import Impl
from pretrain.kernels.softmax_contrastive import softmax_contrastive


def loss(rows: Tensor, columns: Tensor, impl: str) -> Tensor:
    scale = torch.full((), 100.0, device=rows.device)
    return softmax_contrastive(rows, columns, scale, impl=cast("Impl", impl)).mean()


if __name__ == "__main__":
    loss_bench.run(loss, "softmax", 1, 4, __doc__)
