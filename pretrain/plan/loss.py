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


def extra_memory_bytes(loss: Loss, rows: int, columns: int, width: int, bytes_each: int = 4) -> int:
    """Peak memory of forward and backward beyond the features, the gradients that it leaves included.

    fp32 is computed in tiles: scaled rows, both gradients and two tiles. 16 bits are computed in strips: both gradients
    in fp32 and one strip, then the gradients in the features' dtype; the column sums of every 128 rows of at most 8192
    beside them. SigLIP holds its gradients, as fp32, from forward on, while backward makes the multiplied ones.
    """
    features = (rows + columns) * width
    if bytes_each == 4:
        edges = min(1.0, rows / 1024) * min(1.0, columns / 1024)
        swept = 4 * features + 4 * rows * width + int(2 * CPU_TILE_BYTES * edges)
        left = 0
    else:
        swept = 4 * features + min(STRIP_BYTES, 2 * rows * columns)
        swept += 4 * columns * -(-min(rows, 8192) // 128)
        left = bytes_each * features
    return max(swept, 8 * features + left) if loss == "siglip" else swept + left
