"""The 32 images and 32 texts on which two libraries are compared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

COUNT = 32
TEXTS = (
    "a photo of a cat.", "A Diagram, with PUNCTUATION; and 1234 numbers", "", "two dogs",
    "naïve café, 北京, emoji 🙂", "a caption that is far too long for the text tower " * 20,
    "the word is antidisestablishmentarianism", "x", "UPPER CASE ONLY", "don't, we've, I'll, he'd, it's",
    "price: $19.99 (20% off!)", "mail me at someone@example.com", "under_scored_words and-dashed-ones",
    "new\nlines\tand  many   spaces ", "Привет, мир", "日本語のキャプション", "صورة قطة", "한국어 문장",
    "λ = 0.5 ± 0.1 µm",
    "👩‍👩‍👧‍👦 a family at the beach 🏖️", "3/4 cup of sugar", "a photo of a {}.", "[brackets] and <angles>",
    "\"quoted\" and 'quoted'", "ends with dots...", "!!??!!", "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "the end of text", "a satellite image of farmland near the river, 4k, highly detailed, trending",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25", "ÀÉÎÕÜ àéîõü ßø", "a photo of a dog",
)  # fmt: skip
"""Ordinary, odd, overlong and empty; none with HTML entities or broken encodings, which open_clip alone repairs."""


def images(size: tuple[int, int], rounds_crops: bool) -> list[Image.Image]:
    """RGB images: of a model's (height, width), wide, tall, tiny, large and odd; smooth and noisy.

    Args:
        rounds_crops: False leaves out shapes whose crop a library that cuts off, in place of rounding, would place one
            pixel beside: where what overhangs after resizing is 3 more than a multiple of 4.
    """
    shapes = (shape for shape in _shapes(*size) if rounds_crops or _overhang(shape, size[0]) % 4 != 3)
    return [_picture(number, *shape) for number, shape in zip(range(COUNT), shapes, strict=False)]


def _shapes(height: int, width: int) -> Iterator[tuple[int, int]]:
    yield from ((height, width), (height, 3 * width), (2 * height + 1, width), (7, 5), (2 * height, 2 * width + 3))
    random = np.random.default_rng(0)
    while True:
        tall, wide = random.uniform(0.3, 2.5, 2)
        yield max(int(tall * height), 1), max(int(wide * width), 1)


def _overhang(shape: tuple[int, int], length: int) -> int:
    return int(length * max(shape) / min(shape)) - length


def _picture(number: int, height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, width)[None, :, None] + np.linspace(0, 128, height)[:, None, None]
    return Image.fromarray(((noise + ramp * number) / (1 + 1.5 * number)).astype(np.uint8))
