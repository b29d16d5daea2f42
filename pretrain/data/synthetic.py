"""Pairs made from their number: nothing on disk, always the same, and learnable, for smoke runs and benchmarks."""

from __future__ import annotations

import numpy as np

from pretrain.data.order import mix
from pretrain.data.shards.fingerprint import Fact
from pretrain.data.shards.reader import RawSample
from pretrain.values import Skip

COLORS = {
    "red": (200, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 210),
    "yellow": (220, 200, 50),
    "purple": (140, 60, 170),
    "orange": (230, 130, 30),
    "gray": (125, 125, 125),
    "white": (235, 235, 235),
}
PATTERNS = ("rows", "columns", "squares", "diagonals")
_CELLS = 16


class SyntheticSource:
    """A coloured pattern under noise that is the sample's own, with a caption that names it.

    Args:
        samples: how many there are.
        size: (height, width) in pixels.
        first: number of the first one, so that a held-out set shares none with the training set.
    """

    def __init__(self, samples: int, size: tuple[int, int], first: int = 0) -> None:
        self.samples, self.size, self.first = samples, size, first
        self.counts, self.entries = [samples], [1]
        self.weights: list[float] = []
        self.facts = [Fact(f"synthetic:{samples}", 0, samples, f"{size[0]}x{size[1]}", 0)]
        self.damage: tuple[Skip, ...] = ()
        self.fingerprint = f"synthetic-1-{first}-{samples}-{size[0]}x{size[1]}"

    def __len__(self) -> int:
        return self.samples

    def key(self, number: int) -> str:
        return f"synthetic/{self.first + number:09d}"

    def sample(self, number: int) -> RawSample:
        bits = mix(self.first + number)
        color, pattern, width = bits % len(COLORS), (bits >> 8) % len(PATTERNS), 1 + (bits >> 16) % 4
        name = list(COLORS)[color]
        image = _picture(list(COLORS.values())[color], PATTERNS[pattern], width, bits, self.size)
        texts = [f"{name} {PATTERNS[pattern]} of width {width}", f"a picture of {name} {PATTERNS[pattern]}"]
        header = f"P6 {self.size[1]} {self.size[0]} 255\n".encode()
        return RawSample(
            self.key(number), header + image.tobytes(), {"json:captions": texts}, {"label": color, "captions": texts}
        )


def _picture(color: tuple[int, ...], pattern: str, width: int, bits: int, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8."""
    y, x = np.mgrid[:_CELLS, :_CELLS] // width
    marked = {"rows": y, "columns": x, "squares": y // 2 + x // 2, "diagonals": y + x}[pattern] % 2
    noise = np.array([[mix(bits, row, column) % 48 for column in range(_CELLS)] for row in range(_CELLS)])
    cells = (np.array(color)[None, None] * (0.35 + 0.65 * marked[..., None]) + noise[..., None] - 24).clip(0, 255)
    rows, columns = (np.arange(length) * _CELLS // length for length in size)
    return np.ascontiguousarray(cells.astype(np.uint8)[rows][:, columns])
