"""What the forms of the softmax exchange with their caller: sums of a block, shifts, and weights of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """What a block of columns contributes: everything adds over blocks of columns and over holders of rows."""

    rows: Tensor
    """[B] sums of exp(logit - shift) over the block's columns."""
    columns: Tensor
    """[M] sums of the same over the rows."""
    positives: Tensor
    """[B] sums of the logits of a row's positives in this block; 0 where it holds none."""
    column_positives: Tensor | None
    """[M] the same by column; None where a pair is a row's and a column's only positive."""


class Shifts(NamedTuple):
    """What is taken from a logit before its exponential."""

    row: Tensor
    """[] for all logits, which then need one exponential; or [B], for the row sums."""
    column: Tensor | None
    """None, or [M] for the column sums."""

    def at(self, numbers: slice | Tensor) -> Shifts:
        """Those of a block."""
        return Shifts(self.row, None if self.column is None else self.column[numbers])


class Weights(NamedTuple):
    """d loss / d logit = exp(logit - shift) (row + column), less (positive + column_positive) in a positive's entry."""

    row: Tensor
    """[B]"""
    column: Tensor
    """[M]"""
    positive: Tensor
    """[B]"""
    column_positive: Tensor | None
    """[M]; None where a pair is the only positive, and `positive` holds both shares."""
    largest: Tensor
    """[] of which no logit's gradient exceeds four times: the largest upstream gradient of a half loss, of all rows."""

    def at(self, numbers: slice | Tensor) -> Weights:
        """Those of a block."""
        last = None if self.column_positive is None else self.column_positive[numbers]
        return Weights(self.row, self.column[numbers], self.positive, last, self.largest)


def cross_entropy(sums: Tensor, positives: Tensor, shift: Tensor) -> Tensor:
    """log(sum) + shift - positive, to fp32's last bits: near convergence sum = exp(positive - shift), nearly.

    Dividing by the positive's own exponential before the logarithm keeps what their difference would cancel. Where that
    exponential is negligible the pivot stays 15 below the sum, so that nothing overflows.
    """
    shifted = positives - shift
    pivot = torch.maximum(shifted, sums.log() - 15)
    return (sums * (-pivot).exp()).log() + (pivot - shifted)
