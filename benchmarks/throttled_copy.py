"""A copy on the GPU's own processors that takes as long as a link would: few of them, and slowed down on purpose.

That is how NCCL moves data over NVLink: some processors are taken from whatever computes meanwhile, and memory is read
and written beside it.
"""
# ruff: noqa: N803  (compile-time constants are upper case, as triton writes them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192
"""Numbers of 4 bytes that a program moves at a time."""


@triton.jit
def _copy(target, source, count, delay, spin, CHUNK: tl.constexpr):
    """Every program takes each `num_programs`-th chunk, and after each one multiplies `spin` times, one by one."""
    waited = tl.load(delay)
    for first in range(tl.program_id(0).to(tl.int64) * CHUNK, count, tl.num_programs(0).to(tl.int64) * CHUNK):
        at = first + tl.arange(0, CHUNK)
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)
        for _ in range(spin):
            waited = waited * 0.999 + 0.001
    tl.store(delay + 1, waited)  # a result that nobody needs would be compiled away


def throttled_copy(target: Tensor, source: Tensor, programs: int, spin: int, delay: Tensor) -> None:
    """target becomes source, on `programs` processors.

    Args:
        target: contiguous, of a size in bytes that 4 divides.
        source: of as many bytes, contiguous.
        programs: processors that are taken.
        spin: dependent multiplications after each chunk; 0: as fast as so few can.
        delay: [2] fp32, scratch.
    """
    words, copied = (tensor.view(-1).view(torch.int32) for tensor in (source, target))
    _copy[(programs,)](copied, words, words.numel(), delay, spin, CHUNK, num_warps=16)
