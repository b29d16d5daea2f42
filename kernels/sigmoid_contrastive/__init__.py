"""SigLIP's loss: every pair of a row and a column its own yes-or-no question, in one sweep; no logits are held."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels import tiling
from pretrain.kernels.columns import Columns
from pretrain.kernels.dispatch import Impl
from pretrain.kernels.pairing import Duplicates, check_ids
from pretrain.kernels.sigmoid_contrastive import autograd

__all__ = ["sigmoid_contrastive", "sigmoid_contrastive_over"]


def sigmoid_contrastive(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int = 0,
    *,
    duplicates: Duplicates = "negatives",
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Three lines of torch, without their [B, M] logits::

        logits = scale * rows @ columns.T + bias
        labels = 2 * one_hot(offset + arange(B), M) - 1      # -1 in rows whose partner is not among these columns
        total = -logsigmoid(labels * logits).sum()

    Args:
        rows: [B, D]; fp64 is computed in fp64, fp32 in fp32, fp16 and bf16 in products of that dtype with fp32 sums on
            a GPU, in fp32 on the CPU.
        columns: [M, D], the same dtype and device.
        scale: [] factor of the products, fp32 (fp64 for fp64).
        bias: [] added to every logit.
        offset: columns[offset + i] is the partner of rows[i]; may be negative or past the end.
        duplicates: what an entry is whose row_id equals its column_id without being a pair: an ordinary negative, left
            out ("ignore"), or a further positive.
        row_ids, column_ids: [B] and [M] integers; needed unless duplicates are negatives.
        impl: auto takes the fastest form that runs here; see `kernels.dispatch`.

    Returns:
        [] nats, the sum over all B * M pairs, so that blocks and ranks add; fp32 (fp64 for fp64). Differentiable once
        with respect to rows, columns, scale and bias; one operator to torch.compile; autocast changes nothing.

    Raises:
        ValueError: shapes, dtypes, devices, ids or impl do not fit.

    Memory: O((B + M) D) and a bounded workspace. 6 B M D operations: gradients are made in the forward sweep and held.

    Source: Zhai et al. 2023, eq. 1 (arXiv:2303.15343), before its division by the batch size.
    """
    tiling.check(rows, columns, scale=scale, bias=bias)
    check_ids(duplicates, row_ids, column_ids, len(rows), len(columns))
    on = torch.is_grad_enabled()
    needs = [on and x.requires_grad for x in (rows, columns, scale, bias)]
    total: Tensor = autograd.total_here(
        rows, columns, scale, bias, offset, duplicates, row_ids, column_ids, impl, needs
    )[0]
    return total


def sigmoid_contrastive_over(
    rows: Tensor,
    own_columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    columns: Columns,
    *,
    products: Tensor | None = None,
    duplicates: Duplicates = "negatives",
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The same where columns come from elsewhere, in blocks. Everyone who holds rows must call it.

    Args:
        rows: [B, D] as above.
        own_columns: [B, D] the partners, which collect the gradient that all rows, wherever they are, give them.
        scale: [].
        bias: [].
        columns: what brings all N columns, `own_columns` among them.
        products: [B, D] the rows in the dtype in which `columns` come; default: the rows themselves.
        duplicates, row_ids, column_ids: as above, [B] and [N].
        impl: as above.

    Returns:
        [] nats, the sum over these rows and all N columns.
    """
    inner = rows if products is None else products
    swept = autograd.sweep(inner, columns, scale, bias, duplicates, row_ids, column_ids, impl)
    grad_enabled = torch.is_grad_enabled()
    total: Tensor = autograd.Total.apply(rows, own_columns, scale, bias, swept, grad_enabled)  # type: ignore[no-untyped-call]
    return total
