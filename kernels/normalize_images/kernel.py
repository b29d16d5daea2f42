# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The same in one pass: each pixel is read once as a byte and written once in the towers' dtype.

Programs walk the result in the order in which it lies in memory, so that writes are whole lines; where the input lies
in another order it is gathered, three nearby streams that the cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4


@triton.jit
def _normalize(
    images,
    result,
    mean_r,
    mean_g,
    mean_b,
    std_r,
    std_g,
    std_b,
    area,
    blocks,
    IMAGES_LAST: tl.constexpr,
    RESULT_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`BLOCK` values of one image; IMAGES_LAST and RESULT_LAST say whose channels lie innermost."""
    number, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    base = number.to(tl.int64) * area * 3
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < area * 3
    if RESULT_LAST:
        channel, pixel = at % 3, at // 3
    else:
        channel, pixel = at // area, at % area
    source = at if IMAGES_LAST == RESULT_LAST else pixel * 3 + channel if IMAGES_LAST else channel * area + pixel
    value = tl.load(images + base + source, mask=inside, other=0).to(tl.float32)
    mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
    std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
    # div_rn rounds as torch's division does; a plain / is up to two ulp off on a GPU
    value = tl.div_rn(tl.div_rn(value, tl.full((BLOCK,), 255.0, tl.float32)) - mean, std)
    tl.store(result + base + at, value.to(result.dtype.element_ty), mask=inside)


def normalize_images(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    layout: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    pixels = images if layout == "nchw" else images.permute(0, 3, 1, 2)
    innermost = pixels.is_contiguous(memory_format=torch.channels_last)
    pixels = pixels if innermost else pixels.contiguous()
    result = torch.empty(pixels.shape, dtype=dtype, device=images.device, memory_format=memory_format)
    area = pixels.shape[2] * pixels.shape[3]
    if 3 * area >= 2**31:
        raise ValueError(f"images {list(images.shape)}: one image must have fewer than 2**31 values")
    blocks = triton.cdiv(3 * area, BLOCK)
    if result.numel():
        _normalize[(len(pixels) * blocks,)](
            pixels,
            result,
            *map(float, mean),  # a whole number would be compiled in
            *map(float, std),
            area,
            blocks,
            innermost,
            memory_format == torch.channels_last,
            BLOCK,
            num_warps=WARPS,
        )
    return result
