"""Handwritten digits with captions in plain English: a real data set small enough for a laptop, and for tests.

The pictures are those of the UCI optical recognition set (Alpaydin and Kaynak 1998) that scikit-learn carries.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from pretrain.data.order import mix
from pretrain.errors import UserError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PLAIN = (
    "a photo of the digit {word}.",
    "a handwritten {word}",
    "the number {digit} written by hand",
    "the digit {digit} in handwriting",
    "a small gray picture of the number {word}",
    "the numeral {digit}, scanned from paper",
)
"""Every sample of a class carries all of these, so that its class is all they tell."""
CLASSES = {
    "names": list(NAMES),
    "templates": ["a photo of the digit {}.", "a handwritten {}", "a small gray picture of the number {}"],
}
_HELD_OUT = 5
"""Every fifth sample of a class, in a fixed random order, is held out."""
_SPLIT_SEED = 20_240


def digit_pairs(size: int) -> dict[str, list[tuple[bytes, str, list[str], dict[str, Any]]]]:
    """(PNG, 'png', captions, {label}) of every digit, by split; the same ones each time.

    Args:
        size: pixels of a side.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("pack digits needs scikit-learn: pip install 'pretrain[digits]'") from None
    found = load_digits()
    held_out = _held_out(found.target.tolist())
    weights, slants = _tertiles([p.sum() for p in found.images]), _tertiles([slant(p) for p in found.images])
    splits: dict[str, list[tuple[bytes, str, list[str], dict[str, Any]]]] = {"train": [], "eval": []}
    for number, (pixels, label) in enumerate(zip(found.images, found.target.tolist(), strict=True)):
        texts = captions(label, weights[number], slants[number])
        pair = (_png(pixels, size), "png", texts, {"label": label})
        splits["eval" if number in held_out else "train"].append(pair)
    return splits


def captions(label: int, weight: int, lean: int) -> list[str]:
    """The plain captions of a class, then two of this picture's own look.

    Args:
        label: 0 to 9.
        weight: 0 thin, 1 medium, 2 bold.
        lean: 0 to the left, 1 upright, 2 to the right.
    """
    word = NAMES[label]
    stroke, look = ("thin", "medium", "bold")[weight], ("leaning left", "upright", "leaning right")[lean]
    plain = [text.format(word=word, digit=label) for text in _PLAIN]
    return [*plain, f"a {stroke} handwritten {word}, {look}", f"the digit {label}, {look}, drawn with {stroke} strokes"]


def slant(pixels: np.ndarray) -> float:
    """How far ink moves to the right for each row upwards, from the second moments of [H, W] ink."""
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    y, x = y - np.average(y, weights=pixels), x - np.average(x, weights=pixels)
    return -float((pixels * x * y).sum() / max((pixels * y * y).sum(), 1e-9))


def _held_out(labels: list[int]) -> set[int]:
    chosen = set[int]()
    for label in sorted(set(labels)):
        own = sorted((n for n, other in enumerate(labels) if other == label), key=lambda n: mix(_SPLIT_SEED, n))
        chosen.update(own[: round(len(own) / _HELD_OUT)])
    return chosen


def _tertiles(values: list[float]) -> list[int]:
    """0, 1 or 2 for the lowest, middle and highest third."""
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    return [int(value > low) + int(value > high) for value in values]


def _png(pixels: np.ndarray, size: int) -> bytes:
    """[8, 8] ink of 0 to 16, as white on black."""
    image = Image.fromarray((pixels * 255 / 16).round().astype(np.uint8))
    file = io.BytesIO()
    image.resize((size, size), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()
