"""Bytes of images to the pixels a tower takes, in one pass over memory.

Memory: the result; blockwise one block of fp32 more. In fp32 every form gives bitwise what torchvision's ToTensor and
Normalize give, whose source this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pretrain.kernels.dispatch import Impl, choose, device_of, load

__all__ = ["normalize_images"]

NAME = "normalize_images"
Layout = Literal["nchw", "nhwc"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = (torch.contiguous_format, torch.channels_last)


@torch.no_grad()
def normalize_images(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    layout: Layout = "nchw",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    impl: Impl = "auto",
) -> Tensor:
    """Three lines of torch, each of which is a pass over memory or several::

        pixels = images if layout == "nchw" else images.permute(0, 3, 1, 2)
        pixels = pixels.to(float32).div_(255).sub_(mean).div_(std)
        return pixels.to(dtype).contiguous(memory_format=memory_format)

    Args:
        images: uint8, [B, 3, H, W] or [B, H, W, 3] as `layout` says; any strides.
        mean: 3 channel means of pixels in [0, 1].
        std: 3 channel deviations, none of them 0.
        layout: "nchw" or "nhwc".
        dtype: fp32, bf16 or fp16: rounded once, from fp32.
        memory_format: how the result lies in memory; convolutions on a GPU run without transposing in channels_last.
        impl: auto takes the fastest form that runs here.

    Returns:
        [B, 3, H, W] `dtype`.

    Raises:
        ValueError: shapes, dtypes, layout, memory format or constants do not fit, or `impl` cannot run here.
    """
    _check(images, mean, std, layout)
    if dtype not in _DTYPES or memory_format not in _FORMATS:
        raise ValueError(f"dtype {dtype} and memory_format {memory_format} must be among {_DTYPES} and {_FORMATS}")
    form = choose(NAME, impl, images.new_empty(0, dtype=dtype))  # what is written decides, not the bytes
    with device_of(images):
        normalized: Tensor = load(NAME, form).normalize_images(images, mean, std, layout, dtype, memory_format)
    return normalized


def _check(images: Tensor, mean: Sequence[float], std: Sequence[float], layout: str) -> None:
    axes = {"nchw": 1, "nhwc": 3}
    if layout not in axes:
        raise ValueError(f"layout {layout!r} must be one of {', '.join(axes)}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[axes[layout]] != 3:
        shape = "[B, 3, H, W]" if layout == "nchw" else "[B, H, W, 3]"
        raise ValueError(f"images {list(images.shape)} {images.dtype} must be {shape} torch.uint8")
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must be three numbers each, no std 0")
