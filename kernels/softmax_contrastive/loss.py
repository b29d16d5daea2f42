"""From sums to losses and back: two sweeps over the columns, wherever they come from.

forward   S = scale rows columns^T;  R_i = sum_j exp(S_ij - shift), C_j = sum_i exp(S_ij - shift), one exponential.
          loss_i = (log R_i + log C_i) / 2 + shift - S_ii
backward  dS_ij = exp(S_ij - shift) (g_i / 2 R_i + g_j / 2 C_j) - g_i [i = j], from S computed once more.

With one shift for all logits the sums of blocks and of ranks simply add. It suits every logit scale up to about 50, and
larger ones unless some row's best cosine is well below 0; where it does not, rows and columns get shifts of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pretrain.kernels.columns import Block, Columns, Pending
from pretrain.kernels.dispatch import device_of
from pretrain.kernels.pairing import Duplicates, Pairing, count_equal
from pretrain.kernels.softmax_contrastive.statistics import Shifts, Sums, Weights, cross_entropy
from pretrain.kernels.tiling import wide

NORM_PRODUCT = 1.01
"""Largest product of a row's and a column's norm that the common shift allows for: 1, rounded to bf16."""
RANGE = {torch.float32: (-60.0, 72.0), torch.float64: (-600.0, 600.0)}
"""Logarithms between which a sum of exponentials is exact: below, single terms may have vanished; above, the reciprocal
that becomes its gradient does once it is divided by 2 B."""


@dataclass(frozen=True)
class State:
    """What backward needs of forward, O(B + N)."""

    row_sums: Tensor
    """[B]"""
    column_sums: Tensor
    """[N] over the rows of everyone."""
    shifts: Shifts
    counts: Tensor | None
    """[2, B] positives of each row, and of its partner column; None where there is one each."""


@dataclass(frozen=True)
class Sweep:
    """One batch of rows against all columns."""

    rows: Tensor
    columns: Columns
    scale: Tensor
    duplicates: Duplicates
    row_ids: Tensor | None
    column_ids: Tensor | None
    """[N]"""
    form: ModuleType
    """blockwise, reference or kernel."""
    gradient_dtype: torch.dtype | None = None
    """Of the gradient's matrix products; None for the features'."""

    def losses(self) -> tuple[Tensor, State]:
        """[B] nats."""
        with device_of(self.rows):
            return self._losses()

    def _losses(self) -> tuple[Tensor, State]:
        found, shifts = self._common_sums() or self._tracked_sums()
        counts, own = self._counts(), self.columns.own
        row_mean = column_mean = found.positives
        if counts is not None and found.column_positives is not None:
            row_mean, column_mean = found.positives / counts[0], own(found.column_positives) / counts[1]
        column_shift = shifts.row if shifts.column is None else own(shifts.column)
        by_row = cross_entropy(found.rows, row_mean, shifts.row)
        by_column = cross_entropy(own(found.columns), column_mean, column_shift)
        return (by_row + by_column) / 2, State(found.rows, found.columns, shifts, counts)

    def gradients(
        self, upstream: Tensor, state: State, need_rows: bool, need_columns: bool
    ) -> tuple[Tensor | None, Pending | None]:
        """Of the losses, weighed by upstream [B], by rows and by columns; both still lack the factor scale."""
        weights = self._weights(upstream / 2, state)
        d_rows = torch.zeros_like(wide(self.rows)) if need_rows else None

        def share(block: Block) -> Tensor:
            shifts, own_weights = state.shifts.at(block.numbers), weights.at(block.numbers)
            given = (self.rows, block.columns, wide(self.scale), shifts, self._pairing(block), own_weights)
            gradient: Tensor = self.form.gradients(*given, d_rows, need_columns, self.gradient_dtype)
            return gradient

        with device_of(self.rows):
            if need_columns:
                return d_rows, self.columns.collect(share)
            for block in self.columns.blocks():
                share(block)
        return d_rows, None

    def _common_sums(self) -> tuple[Sums, Shifts] | None:
        """None, for everyone alike, where one shift does not suit. To know it the CPU waits for the device once."""
        low, high = RANGE[wide(self.rows).dtype]
        shift = (wide(self.scale).abs() * NORM_PRODUCT + math.log(self.columns.count or 1) - high).clamp(min=0)
        found = self._sums(Shifts(shift, None))
        unfit = (~_within(found.rows, low)).sum().to(shift.dtype)
        # The vote of each holder's rows travels with the sums, which all of them see alike.
        parts = [found.columns, unfit[None], *([] if found.column_positives is None else [found.column_positives])]
        columns, vote, *extra = _split(self.columns.sum(torch.cat(parts)), parts)
        if not bool((vote == 0).all() & _within(columns, low).all()):
            return None
        return Sums(found.rows, columns, found.positives, extra[0] if extra else None), Shifts(shift, None)

    def _tracked_sums(self) -> tuple[Sums, Shifts]:
        """Every row and column shifted by its own maximum: right for any finite logits, at three times the cost."""
        by_row = torch.full_like(wide(self.rows[:, 0]), -torch.inf)
        by_column = torch.full((self.columns.count,), -torch.inf, dtype=by_row.dtype, device=by_row.device)
        for block in self.columns.blocks():
            found = self.form.maxima(self.rows, block.columns, wide(self.scale), self._pairing(block))
            by_row = torch.maximum(by_row, found[0])
            by_column[block.numbers] = found[1]
        largest = self.columns.max(by_column)
        # A column that is left out by every row has no maximum, and its sum stays 0 under any shift.
        shifts = Shifts(by_row, torch.where(largest.isneginf(), 0.0, largest))
        partial = self._sums(shifts)
        parts = [partial.columns, *([] if partial.column_positives is None else [partial.column_positives])]
        columns, *extra = _split(self.columns.sum(torch.cat(parts)), parts)
        return Sums(partial.rows, columns, partial.positives, extra[0] if extra else None), shifts

    def _sums(self, shifts: Shifts) -> Sums:
        """Over all columns by row, over these rows by column."""
        rows, positives = (torch.zeros_like(wide(self.rows[:, 0])) for _ in range(2))
        columns = rows.new_zeros(self.columns.count)
        extra = torch.zeros_like(columns) if self.duplicates == "positives" else None
        for block in self.columns.blocks():
            given = (self.rows, block.columns, wide(self.scale), shifts.at(block.numbers), self._pairing(block))
            found: Sums = self.form.sums(*given)
            rows += found.rows
            positives += found.positives
            columns[block.numbers] = found.columns
            if extra is not None and found.column_positives is not None:
                extra[block.numbers] = found.column_positives
        return Sums(rows, columns, positives, extra)

    def _weights(self, half: Tensor, state: State) -> Weights:
        row, column = half / state.row_sums, half / self.columns.own(state.column_sums)
        if state.counts is None:
            by_column = self.columns.spread(column)
            return Weights(row, by_column, 2 * half, None, _largest(by_column * state.column_sums))
        told = self.columns.spread(torch.stack([column, half / state.counts[1]], 1))
        by_column, positive = told[:, 0].contiguous(), told[:, 1].contiguous()
        largest = _largest(by_column * state.column_sums)  # everyone's half: what was divided is multiplied again
        return Weights(row, by_column, half / state.counts[0], positive, largest)

    def _counts(self) -> Tensor | None:
        if self.duplicates != "positives" or self.row_ids is None or self.column_ids is None:
            return None
        by_column = self.columns.sum(count_equal(self.column_ids, self.row_ids))
        return torch.stack([count_equal(self.row_ids, self.column_ids), self.columns.own(by_column)])

    def _pairing(self, block: Block) -> Pairing:
        if self.duplicates == "negatives" or self.column_ids is None:
            return Pairing(block.span)
        return Pairing(block.span, self.duplicates, self.row_ids, self.column_ids[block.numbers])


def _within(sums: Tensor, low: float) -> Tensor:
    return (sums >= math.exp(low)) & (sums < torch.inf)


def _largest(values: Tensor) -> Tensor:
    """[] absolute; 0 of none."""
    return torch.cat([values, values.new_zeros(1)]).abs().max()


def _split(joined: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """What `torch.cat` joined."""
    return list(torch.split(joined, [len(part) for part in parts]))
