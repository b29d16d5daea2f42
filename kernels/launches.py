"""How a pairwise Triton kernel walks a block of logits: launches of many programs, each with scratch for its sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.kernels.pairing import Duplicates, Pairing, codes
from pretrain.kernels.tile_shapes import Kernel, Tile, choose, tiles_per_program

ROWS = 16384
"""Rows of a launch."""
PARTS = 1 << 22
"""Partial sums in one scratch tensor of a launch: 16 MiB."""
VARYING = ["num_rows", "num_columns", "gap", "first", "last", "share"]
"""Arguments for whose values nothing is compiled anew."""

Codes = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Launch:
    """One rectangle of logits, cut into tiles."""

    rows: slice
    columns: slice
    tile: Tile
    numbers: tuple[int, int, int, int, int]
    """num_rows, num_columns, gap, first, last: of the rectangle, and of its pairs (r, r + gap), first <= r < last."""
    kind: Duplicates
    codes: Codes
    """[num_rows] and [num_columns] int32, equal where ids are; None where ids do not matter."""
    share: int
    """Column tiles that a program takes in turn."""

    @property
    def row_tiles(self) -> int:
        return -(-self.numbers[0] // self.tile.rows)

    @property
    def column_tiles(self) -> int:
        return -(-self.numbers[1] // self.tile.columns)

    @property
    def groups(self) -> int:
        return -(-self.column_tiles // self.share)

    @property
    def even(self) -> bool:
        """Whether no tile reaches over the edge."""
        return self.numbers[0] % self.tile.rows == 0 and self.numbers[1] % self.tile.columns == 0

    def options(self, features: Tensor) -> dict[str, Any]:
        """Compile-time constants and the compiler's own options."""
        return self.tile.options(features, self.even and self.kind == "negatives")

    def by_row(self, device: torch.device) -> Tensor:
        """[groups, num_rows] fp32 scratch: a line for each share of the columns, all of it to be written."""
        return torch.empty(self.groups, self.numbers[0], dtype=torch.float32, device=device)

    def by_column(self, device: torch.device) -> Tensor:
        """[row_tiles, num_columns] fp32 scratch: a line for each row tile, all of it to be written."""
        return torch.empty(self.row_tiles, self.numbers[1], dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Plan:
    """What the launches of one call have in common."""

    tile: Tile
    pairing: Pairing
    codes: Codes
    device: torch.device

    @staticmethod
    def of(kernel: Kernel, rows: Tensor, pairing: Pairing) -> Plan:
        """For rows [B, D]; ids are coded once."""
        tile = choose(kernel, rows)
        if pairing.row_ids is None or pairing.column_ids is None or not len(rows) or not len(pairing.column_ids):
            return Plan(tile, pairing, (None, None), rows.device)
        return Plan(tile, pairing, codes(pairing.row_ids, pairing.column_ids), rows.device)

    def launch(self, r: slice, c: slice) -> Launch:
        """One rectangle."""
        span, (row_codes, column_codes) = self.pairing.span.within(r, c), self.codes
        pairs = (span.column - span.row, span.row, span.row + span.count) if span.count else (0, 0, 0)
        own = (None if row_codes is None else row_codes[r], None if column_codes is None else column_codes[c])
        numbers = (r.stop - r.start, c.stop - c.start, *pairs)
        row_tiles, column_tiles = -(-numbers[0] // self.tile.rows), -(-numbers[1] // self.tile.columns)
        share = tiles_per_program(row_tiles, column_tiles, self.device)
        return Launch(r, c, self.tile, numbers, self.pairing.duplicates, own, share)

    def launches(self, rows: int, columns: int) -> Iterator[Launch]:
        """Every logit of rows x columns once, in rectangles whose partial sums stay within their bound."""
        if not rows or not columns:
            return
        row_tiles = -(-min(rows, ROWS) // self.tile.rows)
        width = max(1, PARTS // row_tiles // self.tile.columns) * self.tile.columns
        for top in range(0, rows, ROWS):
            for left in range(0, columns, width):
                yield self.launch(slice(top, min(top + ROWS, rows)), slice(left, min(left + width, columns)))
