"""How large a tile of a pairwise Triton kernel is, and who computes it: a static table, so that a run needs no tuning.

Every rank of a run must take the same tile, because another tile rounds otherwise; a table cannot disagree with itself.
`python -m pretrain.kernels.NAME.bench --tune` measures the candidates of `CANDIDATES` on the GPU at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["softmax", "sigmoid"]


class Tile(NamedTuple):
    """A tile of logits, the features that are in flight at once, and who works on it."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    parts: int = 1
    """In how many parts, by columns, a tile of products becomes sums or gradients."""

    def options(self, features: Tensor, plain: bool) -> dict[str, Any]:
        """What a launch takes of it, for features of one width and dtype.

        A plain launch has no edges and no ids to look at; others need more registers, and so smaller parts.
        """
        width = features.shape[1]
        return {
            "WIDTH": width,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "FEATURES": min(self.features, max(16, power_of_two_from(width))),
            "PARTS": self.parts if plain else min(8, 2 * self.parts),
            "PRECISION": "ieee" if features.dtype == torch.float32 else "tf32",
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


INTERPRETED = Tile(32, 32, 16, 4, 1, 2)
CONSERVATIVE = Tile(128, 128, 32, 8, 3, 4)
"""Fits 100 KiB of shared memory and the registers of every GPU from compute capability 8.0 on."""
FULL = Tile(64, 64, 32, 4, 2, 2)
"""fp32 features, which the matrix units do not serve."""

SM_90: dict[Kernel, list[tuple[int, Tile]]] = {
    "softmax": [(640, Tile(128, 128, 64, 4, 3, 4)), (1 << 30, Tile(128, 256, 64, 8, 3, 4))],
    "sigmoid": [(1 << 30, Tile(128, 256, 64, 8, 3, 4))],
}
"""The largest width that a tile is for, in rising order."""

CANDIDATES = [
    Tile(128, 128, 64, 4, 3, 4),
    Tile(128, 128, 64, 4, 4, 4),
    Tile(128, 128, 64, 8, 3, 2),
    Tile(128, 128, 128, 8, 3, 2),
    Tile(128, 256, 64, 8, 3, 4),
    Tile(128, 256, 64, 8, 4, 4),
    Tile(128, 256, 32, 8, 4, 4),
    Tile(256, 128, 64, 8, 3, 4),
    Tile(256, 128, 64, 8, 4, 4),
    Tile(64, 256, 64, 4, 3, 4),
    CONSERVATIVE,
]

_forced: list[Tile] = []


@contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Every kernel takes this tile meanwhile."""
    _forced.append(tile)
    try:
        yield
    finally:
        _forced.pop()


def choose(kernel: Kernel, features: Tensor) -> Tile:
    """The tile for features [_, D] of a dtype, on their device. A function of these alone."""
    if _forced:
        return _forced[-1]
    device_capability = capability(features.device)
    if device_capability is None:
        return INTERPRETED
    if features.dtype == torch.float32:
        return FULL
    if device_capability != (9, 0):
        return CONSERVATIVE
    return next(tile for widest, tile in SM_90[kernel] if features.shape[1] <= widest)


def capability(device: torch.device) -> tuple[int, int] | None:
    """None where triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def processors(device: torch.device) -> int:
    """How many programs run at the same time, at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power_of_two_from(number: int) -> int:
    """The smallest one that is not below it."""
    return 1 << max(0, number - 1).bit_length()


def tiles_per_program(row_tiles: int, column_tiles: int, device: torch.device) -> int:
    """How many column tiles a program takes in turn, its row sums in registers: as long as the others keep it busy."""
    enough = 8 * processors(device)
    return max(1, min(8, row_tiles * column_tiles // enough))
