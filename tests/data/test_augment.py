"""Augmentations against torchvision's for PIL images, and as functions of their random numbers alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

import pretrain.compat  # noqa: F401 - torchvision's import beside a CPU build of torch
from pretrain.config import Data, Run, Train
from pretrain.data.images import augment
from pretrain.data.images.augment import Augment
from pretrain.errors import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)
ALL = ("color_jitter=0.4", "grayscale=0.3", "blur=0.5", "solarize=0.3", "autocontrast=0.3", "erase=0.5")


class Told(random.Random):
    """Random numbers from a list."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


@pytest.fixture
def image() -> Image.Image:
    coarse = np.random.default_rng(0).integers(60, 190, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)


def test_color_jitter_is_torchvisions(image: Image.Image) -> None:
    import torchvision.transforms.functional as peer

    steps = [peer.adjust_brightness, peer.adjust_contrast, peer.adjust_saturation, peer.adjust_hue]
    factors = [1.24, 0.84, 0.68, 0.05]
    draws = [(1.24 - 0.6) / 0.8, (0.84 - 0.6) / 0.8, (0.68 - 0.6) / 0.8, (0.05 + 0.1) / 0.2]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        expected = image
        for step in order:
            expected = steps[step](expected, factors[step])
        places = [order.index(step) / 4 for step in range(4)]
        found = augment.color_jitter(image, 0.4, Told(*draws, *places))
        assert np.array_equal(np.asarray(found), np.asarray(expected)), order


@pytest.mark.parametrize("turn", [-0.1, -0.004, 0.0, 0.003, 0.1, 0.5])
def test_hue_is_torchvisions(image: Image.Image, turn: float) -> None:
    import torchvision.transforms.functional as peer

    found = np.asarray(augment.turn_hue(image, turn))
    expected = image if abs(turn) < 1 / 255 else peer.adjust_hue(image, turn)
    assert np.array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("grayscale=1", lambda image: image.convert("L").convert("RGB")),
        ("solarize=1", lambda image: image.point(lambda value: value if value < 128 else 255 - value)),
        ("autocontrast=1", ImageOps.autocontrast),
        ("blur=1", lambda image: image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * 0.25))),
    ],
)
def test_what_each_does(image: Image.Image, entry: str, expected: object) -> None:
    found = Augment([entry], "data.augment", MEAN)(image, Told(0.9, 0.25))
    assert np.array_equal(np.asarray(found), np.asarray(expected(image)))  # type: ignore[operator]
    assert not np.array_equal(np.asarray(found), np.asarray(image))


def test_erased_is_a_box_in_the_mean_colour(image: Image.Image) -> None:
    shares = []
    for seed in range(200):
        found = np.asarray(Augment(["erase=1"], "data.augment", MEAN)(image, random.Random(seed)))
        gone = (found == [123, 117, 104]).all(axis=2)
        rows, columns = np.nonzero(gone.any(axis=1))[0], np.nonzero(gone.any(axis=0))[0]
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert gone[box].all()
        assert np.array_equal(found[~gone], np.asarray(image)[~gone])
        shares.append(gone.mean())
    assert 0.015 < min(shares) < 0.04
    assert 0.28 < max(shares) < 0.35


@pytest.mark.parametrize(("entry", "share"), [*((f"{name}=0.3", 0.3) for name in ("grayscale", "blur", "solarize",
                                               "autocontrast", "erase")), ("color_jitter=0.5", 0.8)])  # fmt: skip
def test_how_often(entry: str, share: float) -> None:
    small = Image.fromarray(np.random.default_rng(1).integers(40, 200, (8, 8, 3), dtype=np.uint8))
    steps = Augment([entry], "data.augment", MEAN)
    changed = [steps(small, random.Random(seed)).tobytes() != small.tobytes() for seed in range(1000)]
    assert abs(np.mean(changed) - share) < 0.05


def test_none_and_nothing_change_nothing(image: Image.Image) -> None:
    nothing = Augment([entry.split("=")[0] + "=0" for entry in ALL], "data.augment", MEAN)
    assert not Augment([], "data.augment", MEAN)
    assert nothing
    for seed in range(20):
        assert nothing(image, random.Random(seed)).tobytes() == image.tobytes()


def test_a_function_of_the_random_numbers_in_the_order_of_the_knob(image: Image.Image) -> None:
    before = image.tobytes()
    steps = Augment(ALL, "data.augment", MEAN)
    first = [steps(image, random.Random(seed)).tobytes() for seed in range(40)]
    assert first == [steps(image, random.Random(seed)).tobytes() for seed in range(40)]
    assert len(set(first)) > 35
    assert image.tobytes() == before, "the input is left alone"
    there, back = (Augment(names, "data.augment", MEAN) for names in (["solarize=1", "autocontrast=1"],
                                                                   ["autocontrast=1", "solarize=1"]))  # fmt: skip
    assert there(image, Told(0, 0)).tobytes() == ImageOps.autocontrast(ImageOps.solarize(image)).tobytes()
    assert back(image, Told(0, 0)).tobytes() == ImageOps.solarize(ImageOps.autocontrast(image)).tobytes()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("sharpen=0.5", "'sharpen=0.5' names no augmentation: write NAME=NUMBER with color_jitter, "),
        ("blur", "'blur' must give a chance between 0 and 1, such as blur=0.4"),
        ("blur=often", "'blur=often' must give a chance between 0 and 1"),
        ("blur=nan", "'blur=nan' must give a chance"),
        ("grayscale=1.5", "'grayscale=1.5' must give a chance"),
        ("color_jitter=-1", "'color_jitter=-1' must give a strength"),
    ],
)
@pytest.mark.parametrize("field", ["augment", "view_augment"])
def test_mistakes_are_found_at_the_start(field: str, entry: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        Run(data=Data(train=("synthetic:1024",), **{field: ("blur=0.5", entry)}), train=Train(samples=1))
    assert str(caught.value).startswith(f"data.{field} {says}")
    with pytest.raises(UserError, match=f"^data.{field} "):
        Augment([entry], f"data.{field}", MEAN)
