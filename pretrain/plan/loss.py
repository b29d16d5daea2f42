"""What a contrastive loss costs one rank: operations and memory, by counting."""

from __future__ import annotations

from typing import Literal

Loss = Literal["clip", "siglip"]

FORWARD_PASSES = {"clip": 1, "siglip": 1}
BACKWARD_PASSES = {"clip": 3, "siglip": 2}
"""Products of all rows with all columns. CLIP computes its logits again in backward; SigLIP keeps its gradients."""

CPU_TILE_BYTES = 4 * 1024 * 1024
STRIP_BYTES = 2 * 8192 * 8192
"""Workspaces of a CPU tile, fp32, and of a GPU's strip of logit gradients, in 16 bits."""


def forward_flops(rows: int, columns: int, width: int) -> float:
    """Of the logits alone."""
    return 2.0 * rows * columns * width


def flops(loss: Loss, rows: int, columns: int, width: int) -> float:
    """Of forward and backward: 8 rows columns width for CLIP, 6 for SigLIP."""
    return (FORWARD_PASSES[loss] + BACKWARD_PASSES[loss]) * forward_flops(rows, columns, width)


def extra_memory_bytes(rows: int, columns: int, width: int, bytes_each: int = 4) -> int:
    """Peak memory of forward and backward beyond the features, the gradients that it leaves included.

    In fp32 (tiles): scaled rows, both gradients in fp32 and two tiles. In 16 bits (strips): both gradients in fp32 and
    in the features' dtype, one strip, and the column sums of every 128 rows of at most 8192.
    """
    gradients = 4 * (rows + columns) * width
    if bytes_each == 4:
        edge = min(1.0, rows / 1024) * min(1.0, columns / 1024)
        return gradients + 4 * rows * width + int(2 * CPU_TILE_BYTES * edge)
    strip = min(STRIP_BYTES, 2 * rows * columns)
    statistics = 4 * columns * (-(-min(rows, 8192) // 128))
    return gradients + bytes_each * (rows + columns) * width + strip + statistics
