"""The training crop: its distribution, and the grid that makes scaled decoding exact."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.images.boxes import TURNS, random_box, random_cut
from pretrain.data.order import sample_random

SCALE, RATIO = (0.9, 1.0), (0.75, 4 / 3)


def test_boxes_obey_scale_and_ratio_and_reach_everywhere() -> None:
    width, height, corners = 400, 300, []
    for position in range(400):
        left, top, right, bottom = random_box((width, height), (0.2, 0.6), (0.5, 2.0), sample_random(0, position))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        share, shape = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
        assert 0.19 < share < 0.61
        assert 0.48 < shape < 2.06
        corners.append((left, top, right, bottom, share, math.log(shape)))
    columns = np.array(corners, dtype=float)
    assert columns[:, 0].min() < 8
    assert columns[:, 1].min() < 8
    assert columns[:, 2].max() > width - 8
    assert columns[:, 3].max() > height - 8
    assert abs(columns[:, 4].mean() - 0.4) < 0.03
    assert abs(columns[:, 5].mean()) < 0.08


def test_impossible_shapes_fall_back_to_the_centre() -> None:
    assert random_box((1000, 10), SCALE, RATIO, sample_random(0, 0)) == (493, 0, 506, 10)
    assert random_box((1, 1), SCALE, RATIO, sample_random(0, 0)) == (0, 0, 1, 1)


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.sampled_from(sorted(TURNS)),
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.floats(0.01, 1.0),
    st.integers(0, 1000),
)
def test_a_cut_lies_inside_is_large_enough_and_near_what_was_drawn(
    size: tuple[int, int], orientation: int, out: tuple[int, int], share: float, seed: int
) -> None:
    turn, width, height = TURNS[orientation], *size
    cut = random_cut(size, turn, out, (share, 1.0), RATIO, random.Random(seed))
    cell = 8 // cut.eighths
    assert all(0 <= low < high <= side for low, high, side in zip(cut.box[:2], cut.box[2:], size, strict=True))
    assert cut.scaled[2] <= -(-width // cell)
    assert cut.scaled[3] <= -(-height // cell)
    assert cut.box == (*(edge * cell for edge in cut.scaled[:2]), min(cut.scaled[2] * cell, width),
                       min(cut.scaled[3] * cell, height))  # fmt: skip
    needed = out if turn.transposed else out[::-1]
    if cell > 1:
        assert cut.scaled[2] - cut.scaled[0] >= needed[0]
        assert cut.scaled[3] - cut.scaled[1] >= needed[1]
    drawn = random_box(size[::-1] if turn.transposed else size, (share, 1.0), RATIO, random.Random(seed))
    upright = _upright(cut.box, size, orientation)
    assert max(abs(a - b) for a, b in zip(upright, drawn, strict=True)) <= cell


def _upright(box: tuple[int, int, int, int], size: tuple[int, int], orientation: int) -> tuple[int, int, int, int]:
    """Where Pillow puts a box of a stored image."""
    from PIL import Image, ImageOps

    marked = Image.new("L", size)
    marked.paste(255, box)
    marked.getexif()[0x0112] = orientation
    found = ImageOps.exif_transpose(marked).getbbox()
    assert found is not None
    return found


def test_the_smallest_scale_that_is_enough() -> None:
    def eighths(width: int, height: int) -> int:
        whole = random_cut((width, height), TURNS[1], (224, 224), (1.0, 1.0), (1.0, 1.0), random.Random(0))
        return whole.eighths

    found = [eighths(side, side) for side in (200, 224, 447, 448, 895, 896, 1791, 1792, 8000)]
    assert found == [8, 8, 8, 4, 4, 2, 2, 1, 1]


@pytest.mark.parametrize("side", [447, 448, 449, 1791, 1793])
def test_a_whole_image_stays_whole(side: int) -> None:
    for orientation, turn in TURNS.items():
        cut = random_cut((side, side), turn, (64, 64), (1.0, 1.0), (1.0, 1.0), random.Random(0))
        assert cut.box == (0, 0, side, side), orientation
