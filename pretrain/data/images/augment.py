"""Image augmentations after the crop: small functions (image, number, random numbers) -> image, in any order.

They work on the few pixels that a tower gets, by Pillow, in whole numbers, and use nothing but the `.random()` of the
generator that is passed: the same on every worker and machine. Their definitions are torchvision's for PIL images,
as SimCLR (Chen et al. 2020, arXiv:2002.05709, appendix A), MoCo v2 (arXiv:2003.04297) and SLIP (arXiv:2112.12750,
section 3.3: color_jitter=0.4 grayscale=0.2 blur=0.5) put them together; erasing is Zhong et al. 2017, arXiv:1708.04896.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pretrain.data.images.augmentations import parse
from pretrain.data.images.boxes import random_box, uniform
from pretrain.errors import UserError

Color = tuple[int, int, int]
JITTERED = 0.8
"""Share of the images whose colours are jittered at all, in every one of the sources."""
BLUR_RADIUS = (0.1, 2.0)
"""Standard deviations of the Gaussian, in pixels."""
ERASED_SHARE, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


class Augment:
    """The entries of data.augment or data.view_augment, one after another. False where there are none.

    Args:
        field: the knob, for messages.
        mean: colour of what is erased, RGB in [0, 1]: it is near zero once normalised.

    Raises:
        UserError: an entry is no augmentation.
    """

    def __init__(self, entries: Sequence[str], field: str, mean: Sequence[float]) -> None:
        try:
            self._steps = [parse(entry) for entry in entries]
        except ValueError as mistake:
            raise UserError(f"{field} {mistake}") from None
        red, green, blue = (round(255 * value) for value in mean)
        self._fill = (red, green, blue)

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """An RGB image of the same size."""
        for name, number in self._steps:
            if name == "color_jitter":
                image = color_jitter(image, number, rng) if rng.random() < JITTERED else image
            elif rng.random() < number:
                image = erase(image, self._fill, rng) if name == "erase" else _BY_CHANCE[name](image, rng)
        return image


def color_jitter(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Brightness, contrast and saturation times factors in [1 - strength, 1 + strength], the hue turned by up to
    strength / 4 of the circle, in random order."""
    brightness, contrast, saturation = (uniform(rng, 1 - strength, 1 + strength) for _ in range(3))
    turn = uniform(rng, -strength / 4, strength / 4)
    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: ImageEnhance.Brightness(image).enhance(brightness),
        lambda image: ImageEnhance.Contrast(image).enhance(contrast),
        lambda image: ImageEnhance.Color(image).enhance(saturation),
        lambda image: turn_hue(image, turn),
    ]
    order = [rng.random() for _ in steps]  # not `shuffle`, whose sequence Python does not promise
    for place in sorted(range(len(steps)), key=order.__getitem__):
        image = steps[place](image)
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Colours moved around the circle of hues by `turn` of it, at the same saturation and value."""
    steps = int(turn * 255)
    if not steps:  # the way there and back would still round
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray((np.asarray(hue).astype(np.int16) + steps).astype(np.uint8))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def grayscale(image: Image.Image, rng: random.Random) -> Image.Image:
    """Luma in all three channels."""
    return image.convert("L").convert("RGB")


def blur(image: Image.Image, rng: random.Random) -> Image.Image:
    """A Gaussian of random width; Pillow's, three box filters in a row."""
    return image.filter(ImageFilter.GaussianBlur(uniform(rng, *BLUR_RADIUS)))


def solarize(image: Image.Image, rng: random.Random) -> Image.Image:
    """Values from 128 on inverted."""
    return ImageOps.solarize(image, 128)


def autocontrast(image: Image.Image, rng: random.Random) -> Image.Image:
    """Each channel stretched to its full range."""
    return ImageOps.autocontrast(image)


def erase(image: Image.Image, fill: Color, rng: random.Random) -> Image.Image:
    """A random box in one colour."""
    image = image.copy()
    image.paste(fill, random_box(image.size, ERASED_SHARE, ERASED_RATIO, rng))
    return image


_BY_CHANCE = {"grayscale": grayscale, "blur": blur, "solarize": solarize, "autocontrast": autocontrast}
