"""SigLIP's loss: every pair of a row and a column its own yes-or-no question, in one sweep; no logits are held.

Memory: O((B + M) D) and a bounded workspace. 6 B M D operations: gradients are made in the forward sweep and held.
Products are fp64 for fp64, fp32 for fp32, and for fp16 and bf16 fp32 on the CPU, of that dtype with fp32 sums on a GPU;
the gradient's products there of `gradient_dtype`, by default the features'; everything else is fp32 (fp64), autocast or
not. torch.compile sees one operator. Losses of blocks and of ranks add.

Entries whose row id equals their column id without being a pair are, by `duplicates`: ordinary negatives; left out
("ignore"); or further positives. Partners have equal ids.

Source: Zhai et al. 2023, eq. 1 (arXiv:2303.15343), before its division by the batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels import tiling
from pretrain.kernels.columns import Columns
from pretrain.kernels.dispatch import Impl
from pretrain.kernels.pairing import Duplicates, check_ids
from pretrain.kernels.sigmoid_contrastive import autograd
from pretrain.kernels.strips import name_of

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
    gradient_dtype: torch.dtype | None = None,
) -> Tensor:
    """Three lines of torch, without their [B, M] logits::

        logits = scale * rows @ columns.T + bias
        labels = 2 * one_hot(offset + arange(B), M) - 1      # -1 in rows whose partner is not among these columns
        total = -logsigmoid(labels * logits).sum()

    Args:
        rows, columns: [B, D] and [M, D] of one floating dtype.
        scale: [] fp32 (fp64 for fp64).
        bias: [] added to every logit.
        offset: columns[offset + i] is the partner of rows[i]; may be negative or past the end.
        duplicates, row_ids, column_ids, gradient_dtype: see above; ids are [B] and [M] integers.
        impl: auto takes the fastest form that runs here.

    Returns:
        [] nats, the sum over all B * M pairs; fp32 (fp64 for fp64). Differentiable once.

    Raises:
        ValueError: shapes, dtypes, devices, ids or impl do not fit.
    """
    tiling.check(rows, columns, scale=scale, bias=bias)
    check_ids(duplicates, row_ids, column_ids, len(rows), len(columns))
    scale, bias = tiling.beside(scale, rows), tiling.beside(bias, rows)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (rows, columns, scale, bias)]
    given = (rows, columns, scale, bias, offset, duplicates, row_ids, column_ids, impl, name_of(gradient_dtype))
    total: Tensor = autograd.total_here(*given, needs)[0]
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
    gradient_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same where columns come from elsewhere, in blocks. Everyone who holds rows must call it.

    Args:
        rows: [B, D] as above.
        own_columns: [B, D] the partners, which collect the gradient that all rows, wherever they are, give them.
        scale: [].
        bias: [].
        columns: what brings all N columns, `own_columns` among them.
        products: [B, D] the rows in the dtype in which `columns` come; default: the rows themselves.
        duplicates, row_ids, column_ids, impl, gradient_dtype: as above; ids are [B] and [N].

    Returns:
        [] nats, the sum over these rows and all N columns.
    """
    inner = rows if products is None else products
    given = (scale, bias, duplicates, row_ids, column_ids, impl, name_of(gradient_dtype))
    swept = autograd.sweep(inner, columns, *given)
    grad_enabled = torch.is_grad_enabled()
    total: Tensor = autograd.Total.apply(rows, own_columns, scale, bias, swept, grad_enabled)  # type: ignore[no-untyped-call]
    return total
