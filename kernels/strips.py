"""From a strip of logit gradients to feature gradients: two products on the matrix units, summed in fp32.

A strip is a block of d loss / d logits in the dtype of the matrix products, written by a kernel. Features of several
hundred numbers leave no registers for sums over a whole strip inside that kernel; a library's matrix product does it at
full speed, and 128 MiB are written and read while it computes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from pretrain.kernels.tiling import full_precision

EDGE = 8192
"""Rows and columns of a strip; where one side is shorter the other may be longer."""
BYTES = 2 * EDGE * EDGE
PITCH = 64
"""Rows of a strip start at multiples of so many elements, which matrix products need to run at full speed."""
GRADIENT_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)

log = logging.getLogger("pretrain.kernels")


def name_of(gradient_dtype: torch.dtype | None) -> str | None:
    """As an operator takes it. Raises ValueError where gradients cannot be multiplied in it."""
    if gradient_dtype not in GRADIENT_DTYPES:
        raise ValueError(f"gradient_dtype {gradient_dtype} must be one of {', '.join(map(str, GRADIENT_DTYPES))}")
    return None if gradient_dtype is None else str(gradient_dtype).removeprefix("torch.")


def dtype_of(name: str | None) -> torch.dtype | None:
    """The inverse of `name_of`."""
    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype


def strips(
    rows: Tensor,
    columns: Tensor,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
    dtype: torch.dtype,
    factor: Tensor | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every strip [R, C] in turn with its rows and columns, to be filled; asking for the next adds it to the gradients.

    Args:
        rows: [B, D], contiguous.
        columns: [M, D], contiguous.
        d_rows: [B, D] fp32, to which strip @ columns is added; or None.
        d_columns: [M, D] fp32, to which strip.T @ rows is added; or None.
        dtype: of the strip and of the features it is multiplied with.
        factor: [] a power of two by which the strips are too large; None for 1.
    """
    sums = [x for x in (d_rows, d_columns) if x is not None]
    if factor is not None:
        for total in sums:
            total.mul_(factor)
    workspace: Tensor | None = None
    for r, c in blocks(len(rows), len(columns), dtype.itemsize):
        height, width = r.stop - r.start, c.stop - c.start
        pitch = _up(width)
        if workspace is None:  # the first block is the largest
            workspace = rows.new_empty(height * pitch, dtype=dtype)
        strip = workspace[: height * pitch].view(height, pitch)[:, :width]
        yield r, c, strip
        with full_precision(rows.device):
            if d_rows is not None:
                _add_product(d_rows[r], strip, columns[c].to(dtype))
            if d_columns is not None:
                _add_product(d_columns[c], strip.t(), rows[r].to(dtype))
    if factor is not None:
        for total in sums:
            total.div_(factor)


def blocks(rows: int, columns: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows and of columns, each block at most BYTES large and the first one the largest."""
    if not rows or not columns:
        return
    room = BYTES // itemsize
    width = min(columns, EDGE)
    height = min(rows, max(PITCH, room // _up(width) // PITCH * PITCH))
    width = min(columns, max(PITCH, room // _up(height) // PITCH * PITCH))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def _up(count: int) -> int:
    return -(-count // PITCH) * PITCH


def power_of_two_below(largest: Tensor, limit: float) -> Tensor:
    """[] the power of two that brings a number just below a limit, itself a power of two; 1 for 0. Exact, no sync."""
    mantissa, _ = torch.frexp(largest)
    power = limit * mantissa / largest
    return torch.where(power.isfinite() & (power > 0), power.clamp(2.0**-100, 2.0**100), 1.0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in fp32, whatever their dtype."""
    if not left.is_cuda:
        total += left.float() @ right.float()
    elif left.dtype == torch.float32:
        total.addmm_(left, right)
    elif _adds_in_place(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch adds a low-precision product to fp32 sums in place, and rightly: tried once."""
    left = (torch.arange(16 * PITCH, device=device) % 7).to(dtype).view(16, PITCH)[:, :40]
    right = (torch.arange(40 * 24, device=device) % 5).to(dtype).view(40, 24)
    start = torch.full((16, 24), 0.25, device=device)
    wanted = start.double() + left.double() @ right.double()
    again = start.double() + left[:, :16].t().double()[:16] @ right[:16].double()
    try:
        found, turned = start.clone(), start.clone()
        torch.addmm(found, left, right, out_dtype=torch.float32, out=found)
        torch.addmm(turned, left[:, :16].t(), right[:16], out_dtype=torch.float32, out=turned)
        right_sums = torch.equal(found.double(), wanted) and torch.equal(turned.double(), again)
        reason = "its sums are wrong"
    except (RuntimeError, TypeError) as error:
        right_sums, reason = False, str(error).split("\n")[0]
    if not right_sums:
        log.warning("gradient products take a temporary: addmm into fp32 does not work for %s here: %s", dtype, reason)
    return right_sums
