"""CLIP's loss: each row picks its partner among all columns, and is picked by it among all rows; no logits are held.

Memory: O((B + M) D) and a bounded workspace. 8 B M D operations forward and backward, which computes the logits once
more. Products are fp64 for fp64, fp32 for fp32, and for fp16 and bf16 fp32 on the CPU, of that dtype with fp32 sums on
a GPU; the gradient's products there of `gradient_dtype`, by default the features'; everything else is fp32 (fp64),
autocast or not. torch.compile sees one operator.

Entries whose row id equals their column id without being a pair are, by `duplicates`: ordinary negatives; left out of
every sum ("ignore"); or further positives, over all of which the target is spread evenly. Partners have equal ids.

Source: Radford et al. 2021, fig. 3 (arXiv:2103.00020); several positives: Khosla et al. 2020, eq. 2 (arXiv:2004.11362).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels import tiling
from pretrain.kernels.columns import Columns
from pretrain.kernels.dispatch import Impl
from pretrain.kernels.pairing import Duplicates, check_ids
from pretrain.kernels.softmax_contrastive import autograd
from pretrain.kernels.strips import name_of

__all__ = ["softmax_contrastive", "softmax_contrastive_over"]


def softmax_contrastive(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    offset: int = 0,
    *,
    duplicates: Duplicates = "negatives",
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    impl: Impl = "auto",
    gradient_dtype: torch.dtype | None = None,
) -> Tensor:
    """Four lines of torch, without their [B, M] logits::

        logits, own = scale * rows @ columns.T, offset + arange(B)
        by_row = cross_entropy(logits, own, reduction="none")
        by_column = cross_entropy(logits.T[own], arange(B), reduction="none")
        losses = (by_row + by_column) / 2

    Args:
        rows, columns: [B, D] and [M, D] of one floating dtype.
        scale, bias: [] fp32 (fp64 for fp64). A bias changes nothing and its gradient is zero.
        offset: columns[offset + i] is the partner of rows[i] and must exist.
        duplicates, row_ids, column_ids, gradient_dtype: see above; ids are [B] and [M] integers.
        impl: auto takes the fastest form that runs here.

    Returns:
        [B] nats, fp32 (fp64 for fp64). Differentiable once.

    Raises:
        ValueError: shapes, dtypes, devices, ids, offset or impl do not fit.
    """
    tiling.check(rows, columns, scale=scale, **({} if bias is None else {"bias": bias}))
    check_ids(duplicates, row_ids, column_ids, len(rows), len(columns))
    if not len(rows) or offset < 0 or offset + len(rows) > len(columns):
        raise ValueError(f"offset {offset}: {len(rows)} rows need their partners among {len(columns)} columns")
    how = (offset, duplicates, row_ids, column_ids, impl, name_of(gradient_dtype))
    losses: Tensor = autograd.losses_here(rows, columns, tiling.beside(scale, rows), *how)[0]
    return losses if bias is None else losses + 0 * bias


def softmax_contrastive_over(
    rows: Tensor,
    own_columns: Tensor,
    scale: Tensor,
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
        columns: what brings all N columns, `own_columns` among them.
        products: [B, D] the rows in the dtype in which `columns` come; default: the rows themselves.
        duplicates, row_ids, column_ids, impl, gradient_dtype: as above; ids are [B] and [N].

    Returns:
        [B] nats: each row against all N columns, each partner against all N rows.
    """
    inner = rows if products is None else products
    swept = autograd.sweep(inner, columns, scale, duplicates, row_ids, column_ids, impl, name_of(gradient_dtype))
    losses: Tensor = autograd.Losses.apply(rows, own_columns, scale, swept)  # type: ignore[no-untyped-call]
    return losses
