"""What the torch forms of the pairwise kernels share: input rules, full fp32 arithmetic, and the walk over tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CPU_TILE, GPU_TILE = 1024, 8192
"""Edge of a tile. 1024 x 1024 fp32 stays near a core's cache; 8192 x 8192 keeps a GPU's matmuls full at 256 MiB."""


def check(rows: Tensor, columns: Tensor, **scalars: Tensor) -> None:
    """Raise ValueError unless rows are [B, D] and columns [M, D], floating, of one dtype and device, the scalars []."""
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(f"rows {list(rows.shape)} and columns {list(columns.shape)} must be [B, D] and [M, D]")
    if rows.dtype != columns.dtype or not rows.is_floating_point():
        raise ValueError(f"rows {rows.dtype} and columns {columns.dtype} must share one floating dtype")
    if rows.device != columns.device:
        raise ValueError(f"rows on {rows.device} and columns on {columns.device} must share one device")
    for name, value in scalars.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} {value!r} must be a tensor [], torch.tensor({value!r}) for instance")
        if value.ndim:
            raise ValueError(f"{name} {list(value.shape)} must be a scalar []")
        if value.device != rows.device:
            raise ValueError(f"{name} on {value.device} must be on {rows.device}, as the features are")


def wide(tensor: Tensor) -> Tensor:
    """In the dtype the loss is computed in: fp64 stays, everything else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def beside(scalar: Tensor, features: Tensor) -> Tensor:
    """A scalar in the dtype in which features are computed: fp32, or fp64 beside fp64."""
    return scalar.to(torch.float64 if features.dtype == torch.float64 else torch.float32)


def require_finite(**scalars: Tensor) -> None:
    """Raise ValueError for one that is not, where looking at it does not make the CPU wait for a GPU."""
    for name, value in scalars.items():
        if not value.is_cuda and not bool(value.isfinite()):
            raise ValueError(f"{name} {float(value)} must be finite")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 products as fp32, whatever autocast, TF32 or bf16-matmul settings surround the loss.

    A logit of 100 in bf16 has a step of 0.5, in TF32 of 0.06; both drown the gradient of a nearly converged batch.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def products(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every tile of rows @ columns.T with its row and column range, in one workspace that the caller may overwrite."""
    edge = GPU_TILE if rows.is_cuda else CPU_TILE
    workspace = rows.new_empty(min(edge, len(rows)) * min(edge, len(columns)))
    for top in range(0, len(rows), edge):
        r = slice(top, min(top + edge, len(rows)))
        for left in range(0, len(columns), edge):
            c = slice(left, min(left + edge, len(columns)))
            height, width = r.stop - r.start, c.stop - c.start
            tile = workspace[: height * width].view(height, width)
            yield r, c, torch.mm(rows[r], columns[c].t(), out=tile)
