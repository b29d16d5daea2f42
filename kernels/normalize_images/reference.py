"""Obviously right and never optimized: one pass over memory for each operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def normalize_images(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    pixels = images if layout == "nchw" else images.permute(0, 3, 1, 2)
    full, center, width = constants(images, mean, std)
    return ((pixels.float() / full - center) / width).to(dtype).contiguous(memory_format=memory_format)


def constants(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Iterator[Tensor]:
    """255, mean and std as [1 or 3, 1, 1] fp32: CUDA divides by a Python number through its rounded reciprocal."""
    return (images.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in ((255.0,), mean, std))
