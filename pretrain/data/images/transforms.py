"""RGB images -> the pixels a tower takes: uint8 on the way to the device, normalised there.

Evaluation equals open_clip's `image_transform` bit for bit. pixels.py makes the pixels of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.data.images.boxes import Size
from pretrain.kernels.normalize_images import normalize_images


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


def eval_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """The same pixels as open_clip's evaluation transform of this RGB image before it makes floats of them.

    Returns:
        [3, H, W] uint8.

    Raises:
        ValueError: unknown spec.resize_mode.
    """
    if spec.resize_mode == "squash":
        return _channels_first(resize(image, spec.size, spec.filter))
    if spec.resize_mode == "longest":
        return _channels_first(
            _center(_keep_ratio(image, spec.size, spec.filter, longest=True), spec.size, spec.fill_color)
        )
    if spec.resize_mode != "shortest":
        raise ValueError(f"resize_mode {spec.resize_mode!r} must be shortest, longest or squash")
    if spec.size[0] == spec.size[1]:
        image = resize(image, _shortest_to(image, spec.size[0]), spec.filter)
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


def resize(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """By Pillow to (height, width); an image that has it already is left alone."""
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
    return resize(image, (round(image.height / ratio), round(image.width / ratio)), resample)


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
