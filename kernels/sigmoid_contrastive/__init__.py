"""The sigmoid side of contrastive losses: every pair its own yes-or-no question, summed in one sweep."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pretrain.kernels import tiling
from pretrain.kernels.sigmoid_contrastive import blockwise, reference

__all__ = ["sigmoid_contrastive"]

Impl = Literal["auto", "blockwise", "reference"]


def sigmoid_contrastive(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, offset: int = 0, impl: Impl = "auto"
) -> Tensor:
    """Three lines of torch, without their [B, M] logits::

        logits = scale * rows @ columns.T + bias
        labels = 2 * one_hot(offset + arange(B), M) - 1      # -1 in rows whose partner is not among these columns
        total = -logsigmoid(labels * logits).sum()

    Args:
        rows: [B, D]; fp64 is computed in fp64, every other dtype in fp32.
        columns: [M, D], the same dtype.
        scale: [] factor of the products.
        bias: [] added to every logit.
        offset: columns[offset + i] is the partner of rows[i]; may be negative or past the end.
        impl: auto takes the fastest form that runs here.

    Returns:
        [] nats, the sum over all B * M pairs, so that blocks and ranks add; fp64 for fp64 input, else fp32.
        Differentiable once with respect to rows, columns, scale and bias.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Memory: O((B + M) D) and two tiles. Gradients are made in the forward sweep (none of it is repeated) and held.

    Source: Zhai et al. 2023, eq. 1 (arXiv:2303.15343), before its division by the batch size.
    """
    tiling.check(rows, columns, scale=scale, bias=bias)
    form = reference.sigmoid_contrastive if impl == "reference" else blockwise.sigmoid_contrastive
    return form(rows, columns, scale, bias, offset)
