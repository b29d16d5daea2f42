"""Which part of an image is trained on: the field's random crop, on a grid that scaled decoding keeps whole.

The crop is Szegedy et al. 2015, arXiv:1409.4842, section 6, drawn from the sample's own randomness.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

Size = tuple[int, int]
Box = tuple[int, int, int, int]
"""left, top, right, bottom, in pixels."""
_CROP_ATTEMPTS = 10
_SCALES = (1, 2, 4)
"""Eighths to which libjpeg-turbo decodes with vector instructions; 3, 5, 6, 7 take longer than all 8."""


class Turn(NamedTuple):
    """How a stored image is turned upright: transposed first, then mirrored."""

    transposed: bool
    across: bool
    """left and right exchanged."""
    down: bool
    """top and bottom exchanged."""


TURNS = {
    1: Turn(False, False, False),
    2: Turn(False, True, False),
    3: Turn(False, True, True),
    4: Turn(False, False, True),
    5: Turn(True, False, False),
    6: Turn(True, True, False),
    7: Turn(True, True, True),
    8: Turn(True, False, True),
}
"""By EXIF orientation."""


class Cut(NamedTuple):
    """A part of a stored image."""

    box: Box
    """In pixels of the stored image."""
    scaled: Box
    """The same in the image decoded at `eighths` of its size."""
    eighths: int
    """Smallest scale, 1, 2, 4 or 8, at which the part is at least as large as what is made of it."""


def random_cut(
    size: Size, turn: Turn, out: Size, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Cut:
    """A random part of an image, drawn upright, to be resized to `out`.

    Its edges move to the nearest that both the image and its scaled decoding have, at most half a pixel of the
    result: so the fast path and the exact one train on the same part, and neither has to resample between pixels.

    Args:
        size: (width, height) as stored.
        out: (height, width) upright.
        scale: range of the share of the area, uniform.
        ratio: range of width / height, uniform in its logarithm.
    """
    width, height = size[::-1] if turn.transposed else size
    left, top, right, bottom = random_box((width, height), scale, ratio, rng)
    if turn.across:
        left, right = width - right, width - left
    if turn.down:
        top, bottom = height - bottom, height - top
    box, needed = (left, top, right, bottom), out[::-1]
    if turn.transposed:
        box, needed = (top, left, bottom, right), out
    eighths = _eighths(size, box, needed)
    across = _snap(box[0], box[2], size[0], 8 // eighths)
    down = _snap(box[1], box[3], size[1], 8 // eighths)
    scaled = (across[0], down[0], across[1], down[1])
    left, top, right, bottom = (edge * 8 // eighths for edge in scaled)
    return Cut((left, top, min(right, size[0]), min(bottom, size[1])), scaled, eighths)


def _eighths(size: Size, box: Box, needed: Size) -> int:
    if min(size) < 8:  # several scales would give the same size
        return 8
    width, height = box[2] - box[0], box[3] - box[1]
    return next((n for n in _SCALES if width * n >= 8 * needed[0] and height * n >= 8 * needed[1]), 8)


def _snap(low: int, high: int, length: int, cell: int) -> tuple[int, int]:
    """Cells [first, last) nearest to the pixels [low, high) of `length`; the last cell may reach past the end."""
    cells = -(-length // cell)
    if (low, high) == (0, length):
        return 0, cells
    count = min((2 * (high - low) + cell) // (2 * cell), cells)
    first = min((2 * low + cell) // (2 * cell), cells - count)
    return first, first + count


def random_box(size: Size, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random) -> Box:
    """A box of a random share of the area and a random shape inside an image.

    Args:
        size: (width, height) of the image.
        scale: range of the share of the area, uniform.
        ratio: range of width / height, uniform in its logarithm.
    """
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * uniform(rng, *scale)
        shape = math.exp(uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    shape = min(max(width / height, ratio[0]), ratio[1])  # the largest centred box of an allowed shape
    w, h = max(1, min(width, round(height * shape))), max(1, min(height, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def uniform(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
