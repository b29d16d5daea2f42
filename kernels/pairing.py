"""Which entries of a block of logits are pairs: its diagonal, and entries whose ids are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Duplicates = Literal["negatives", "ignore", "positives"]
"""What an entry is whose row and column carry the same id without being each other's partner: an ordinary negative;
left out of every sum; or a further positive, the target being spread evenly over all positives."""


@dataclass(frozen=True)
class Span:
    """rows[row + n] and columns[column + n] are partners, for every n below count."""

    row: int
    column: int
    count: int

    @staticmethod
    def at(offset: int, rows: int, columns: int) -> Span:
        """columns[offset + i] is the partner of rows[i], where it is one of the columns."""
        row, column = max(0, -offset), max(0, offset)
        return Span(row, column, max(0, min(rows - row, columns - column)))

    def within(self, rows: slice, columns: slice) -> Span:
        """The part that lies in a tile, counted from the tile's corner; count 0 where none does."""
        first = max(0, rows.start - self.row, columns.start - self.column)
        last = min(self.count, rows.stop - self.row, columns.stop - self.column)
        return Span(self.row + first - rows.start, self.column + first - columns.start, max(0, last - first))

    def entries(self, tile: Tensor) -> Tensor:
        """A view [count] of the pairs' entries of a tile."""
        corner = tile[self.row : self.row + self.count, self.column : self.column + self.count]
        return corner.diagonal()


@dataclass(frozen=True)
class Pairing:
    """The pairs of a block."""

    span: Span
    duplicates: Duplicates = "negatives"
    row_ids: Tensor | None = None
    """[B] int64; None where duplicates are negatives."""
    column_ids: Tensor | None = None
    """[M] int64"""

    def duplicated(self, r: slice, c: slice) -> tuple[Tensor, Tensor] | None:
        """Row and column, within a tile, of entries with equal ids that are no partners; None where there is none."""
        if self.row_ids is None or self.column_ids is None:
            return None
        equal = self.row_ids[r, None] == self.column_ids[c]
        self.span.within(r, c).entries(equal).fill_(False)
        found = equal.nonzero(as_tuple=True)
        return (found[0], found[1]) if len(found[0]) else None


def count_equal(ids: Tensor, among: Tensor) -> Tensor:
    """[len(ids)] int64: how many of `among` equal each id. O((n + m) log m) time, O(n + m) memory."""
    ordered = among.sort().values
    last = torch.searchsorted(ordered, ids, right=True)
    return last - torch.searchsorted(ordered, ids)


def codes(row_ids: Tensor, column_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B] and [M] int32, equal where the ids are: half the registers and comparisons of int64 ones. M must not be 0."""
    ordered = column_ids.sort().values
    by_row = torch.searchsorted(ordered, row_ids).clamp_(max=len(ordered) - 1)
    by_row = torch.where(ordered[by_row] == row_ids, by_row, -1)
    return by_row.int(), torch.searchsorted(ordered, column_ids).int()


def check_ids(duplicates: str, row_ids: Tensor | None, column_ids: Tensor | None, rows: int, columns: int) -> None:
    """Raise ValueError unless duplicates is known and ids are [rows] and [columns] integers where it needs them."""
    if duplicates not in get_args(Duplicates):
        raise ValueError(f"duplicates {duplicates!r} must be one of {', '.join(get_args(Duplicates))}")
    if duplicates == "negatives":
        return
    for name, ids, count in (("row_ids", row_ids, rows), ("column_ids", column_ids, columns)):
        found = None if ids is None else (list(ids.shape), ids.dtype)
        if ids is None or ids.shape != (count,) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"duplicates {duplicates!r} needs {name} [{count}] of integers, not {found}")


def require_equal(row_ids: Tensor | None, column_ids: Tensor | None, span: Span) -> None:
    """Raise ValueError where partners have different ids; unlooked-at on a GPU, for which the CPU would wait."""
    if row_ids is None or column_ids is None or row_ids.is_cuda:
        return
    own = row_ids[span.row : span.row + span.count]
    differ = (own != column_ids[span.column : span.column + span.count]).nonzero()
    if len(differ):
        n = int(differ[0])
        other = int(column_ids[span.column + n])
        raise ValueError(f"row_ids[{span.row + n}] {int(own[n])} must equal column_ids[{span.column + n}] {other}")
