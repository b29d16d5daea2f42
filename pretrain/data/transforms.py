"""RGB images -> the pixels a tower takes: uint8 on the way to the device, normalised there.

Evaluation equals open_clip's `image_transform` bit for bit. The training crop is the field's random resized crop
(Szegedy et al. 2015, arXiv:1409.4842, section 6), drawn from the sample's own randomness.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pretrain.config import Data
from pretrain.kernels.normalize_images import normalize_images

Size = tuple[int, int]
Box = tuple[int, int, int, int]
"""left, top, right, bottom, in pixels."""
_CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class ImageSpec:
    """The preprocessing a model was made for; open_clip's `preprocess_cfg`."""

    size: Size
    """(height, width) in pixels."""
    mean: tuple[float, ...]
    """3 channel means of pixels in [0, 1]."""
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    """'bilinear', or else bicubic."""
    resize_mode: str = "shortest"
    """Evaluation: 'shortest' edge fitted and the rest cut, 'longest' edge fitted and padded, 'squash'."""
    fill_color: int = 0
    """Padding, 0 to 255."""

    @property
    def filter(self) -> Image.Resampling:
        return Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC


def train_image(image: Image.Image, spec: ImageSpec, data: Data, rng: random.Random) -> np.ndarray:
    """A random crop, resized, and mirrored half of the time if `data.flip`.

    Args:
        image: RGB.
        rng: of this sample; the same state gives the same pixels.

    Returns:
        [3, H, W] uint8.
    """
    box = random_box(image.size, data.crop_scale, data.crop_ratio, rng)
    image = _resize(image.crop(box), spec.size, spec.filter)
    if data.flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return _channels_first(image)


def eval_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """The same pixels as open_clip's evaluation transform of this RGB image before it makes floats of them.

    Returns:
        [3, H, W] uint8.

    Raises:
        ValueError: unknown spec.resize_mode.
    """
    if spec.resize_mode == "squash":
        return _channels_first(_resize(image, spec.size, spec.filter))
    if spec.resize_mode == "longest":
        return _channels_first(
            _center(_keep_ratio(image, spec.size, spec.filter, longest=True), spec.size, spec.fill_color)
        )
    if spec.resize_mode != "shortest":
        raise ValueError(f"resize_mode {spec.resize_mode!r} must be shortest, longest or squash")
    if spec.size[0] == spec.size[1]:
        image = _resize(image, _shortest_to(image, spec.size[0]), spec.filter)
    else:  # open_clip's branch for other shapes is bicubic whatever the spec says
        image = _keep_ratio(image, spec.size, Image.Resampling.BICUBIC, longest=False)
    return _channels_first(_center(image, spec.size, 0))


def normalize(images: Tensor, spec: ImageSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """(images / 255 - mean) / std, on whatever device they are on.

    Args:
        images: [B, 3, H, W] uint8.
        dtype: fp32, bf16 or fp16; the arithmetic is fp32.

    Returns:
        [B, 3, H, W] `dtype`, in fp32 bitwise what ToTensor and Normalize give. On a GPU it lies in channels_last, as
        convolutions there take it without transposing; elsewhere it is contiguous.

    Raises:
        ValueError: shape or dtypes do not fit.
    """
    memory_format = torch.channels_last if images.is_cuda else torch.contiguous_format
    return normalize_images(images, spec.mean, spec.std, dtype=dtype, memory_format=memory_format)


def random_box(size: Size, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random) -> Box:
    """A box of a random share of the area and a random shape inside an image.

    Args:
        size: (width, height) of the image.
        scale: range of the share of the area, uniform.
        ratio: range of width / height, uniform in its logarithm.
    """
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * _uniform(rng, *scale)
        shape = math.exp(_uniform(rng, math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    shape = min(max(width / height, ratio[0]), ratio[1])  # the largest centred box of an allowed shape
    w, h = max(1, min(width, round(height * shape))), max(1, min(height, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resize(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), resample)


def _shortest_to(image: Image.Image, length: int) -> Size:
    width, height = image.size
    if width <= height:
        return int(length * height / width), length
    return length, int(length * width / height)


def _keep_ratio(image: Image.Image, size: Size, resample: Image.Resampling, longest: bool) -> Image.Image:
    ratios = image.height / size[0], image.width / size[1]
    ratio = max(ratios) if longest else min(ratios)
    return _resize(image, (round(image.height / ratio), round(image.width / ratio)), resample)


def _center(image: Image.Image, size: Size, fill: int) -> Image.Image:
    """The middle (height, width) of an image, padded on all sides where it is smaller."""
    height, width = size
    if image.width < width or image.height < height:
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), (fill, fill, fill))
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        image = canvas
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _uniform(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
