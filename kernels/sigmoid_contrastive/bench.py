"""Time of SigLIP's loss in the forms that run here: `python -m pretrain.kernels.sigmoid_contrastive.bench`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pretrain.kernels import loss_bench
from pretrain.kernels.dispatch import Impl
from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive


def loss(rows: Tensor, columns: Tensor, impl: str) -> Tensor:
    scale, bias = (torch.full((), value, device=rows.device) for value in (10.0, -10.0))
    return sigmoid_contrastive(rows, columns, scale, bias, impl=cast("Impl", impl)) / len(rows)


if __name__ == "__main__":
    loss_bench.run(loss, "sigmoid", 1, 3, __doc__)
