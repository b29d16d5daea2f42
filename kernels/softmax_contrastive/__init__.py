"""The softmax side of contrastive losses: sums of exponentials of all logits by row and by column, from one sweep.

Being sums, they add: over blocks of columns, over ranks. Log, cross-entropy and mean are left to the caller, on [B].
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pretrain.kernels import tiling
from pretrain.kernels.softmax_contrastive import blockwise, reference
from pretrain.kernels.softmax_contrastive.reference import Sums

__all__ = ["Sums", "softmax_contrastive", "softmax_maxima"]

Impl = Literal["auto", "blockwise", "reference"]


def softmax_contrastive(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    shift: Tensor,
    column_shift: Tensor | None = None,
    offset: int = 0,
    impl: Impl = "auto",
) -> Sums:
    """Three lines of torch, without their [B, M] logits::

        logits = scale * rows @ columns.T
        row_sums, column_sums = (logits - shift).exp().sum(1), (logits - shift).exp().sum(0)
        positives = logits.diagonal(offset)        # 0 for rows whose partner is not among these columns

    Args:
        rows: [B, D]; fp64 is computed in fp64, every other dtype in fp32.
        columns: [M, D], the same dtype.
        scale: [] factor of the products.
        shift: [] taken from every logit before the exponential, which then serves row and column. No gradient.
            Or [B], for the row sums alone, together with `column_shift`: two exponentials, any range.
        column_shift: [M] for the column sums.
        offset: columns[offset + i] is the partner of rows[i]; may be negative or past the end.
        impl: auto takes the fastest form that runs here.

    Returns:
        row_sums [B], column_sums [M], positives [B]; fp64 for fp64 input, else fp32. Differentiable once with respect
        to rows, columns and scale. A sum may overflow or vanish where `shift` does not suit it: the caller looks at it.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Memory: O((B + M) D) and two tiles. Backward computes the logits again.

    Source: Radford et al. 2021, fig. 3 (arXiv:2103.00020); the sums instead of two log-softmaxes are this project's.
    """
    tiling.check(rows, columns, scale=scale)
    _check_shifts(len(rows), len(columns), shift, column_shift)
    form = reference.softmax_contrastive if impl == "reference" else blockwise.softmax_contrastive
    return form(rows, columns, scale, shift, column_shift, offset)


def softmax_maxima(rows: Tensor, columns: Tensor, scale: Tensor, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Largest logit of each row [B] and column [M], without gradient: shifts that suit any range of logits.

    Args:
        rows: [B, D].
        columns: [M, D].
        scale: [].
        impl: as above.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    tiling.check(rows, columns, scale=scale)
    form = reference.softmax_maxima if impl == "reference" else blockwise.softmax_maxima
    return form(rows, columns, scale)


def _check_shifts(rows: int, columns: int, shift: Tensor, column_shift: Tensor | None) -> None:
    wanted = [()] if column_shift is None else [(rows,), (columns,)]
    found = [tuple(s.shape) for s in (shift, column_shift) if s is not None]
    if found != wanted:
        raise ValueError(f"shift shapes {found} must be {wanted} for {rows} rows and {columns} columns")
