"""The preprocessing that an export's constants describe, with Pillow and NumPy alone: copy it to where you need it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image


def preprocess(image: Image.Image, constants: Mapping[str, Any]) -> np.ndarray:
    """An RGB image -> [3, H, W] fp32.

    Args:
        constants: size [H, W], mean and std (of pixels in [0, 1]), interpolation 'bicubic' or 'bilinear', resize_mode
            'squash' | 'shortest' (fit the shorter edge, cut the rest) | 'longest' (fit the longer edge, pad the rest)
            and fill_color.
    """
    height, width = constants["size"]
    mode = constants["resize_mode"]
    resample = Image.Resampling.BILINEAR if constants["interpolation"] == "bilinear" else Image.Resampling.BICUBIC
    if mode == "shortest" and height != width:  # as open_clip does it
        resample = Image.Resampling.BICUBIC
    image = image.resize(_resized(image, height, width, mode), resample)
    image = _center(image, height, width, constants["fill_color"] if mode == "longest" else 0)
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(constants[name], np.float32)[:, None, None] for name in ("mean", "std"))
    result: np.ndarray = (pixels - mean) / std
    return result


def _resized(image: Image.Image, height: int, width: int, mode: str) -> tuple[int, int]:
    """(width, height) before the crop."""
    if mode == "squash":
        return width, height
    if mode == "shortest" and height == width:
        short = min(image.size)
        return tuple(height if edge == short else int(height * edge / short) for edge in image.size)  # type: ignore[return-value]
    ratios = image.height / height, image.width / width
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return round(image.width / ratio), round(image.height / ratio)


def _center(image: Image.Image, height: int, width: int, fill: int) -> Image.Image:
    if image.width < width or image.height < height:
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), (fill, fill, fill))
        canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
        image = canvas
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
