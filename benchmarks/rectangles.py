"""What one rank of W computes, on one device: its b rows against the B columns of all ranks.

The columns' position is an argument of the kernels, so that the shape, work and memory of rank r of W are measured
exactly; only the exchange is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from benchmarks import measure
from benchmarks.peers import forward, forward_backward
from benchmarks.report import Budget, Record
from pretrain.kernels.softmax_contrastive import softmax_contrastive
from pretrain.plan.loss import extra_memory_bytes

ROWS, COLUMNS = (256, 1024, 4096, 8192), (8192, 65536, 262144, 1048576)


@dataclass(frozen=True)
class Rectangle:
    """b rows, B columns, and what was measured."""

    rows: int
    columns: int
    width: int
    forward_s: float
    both_s: float
    extra_bytes: int

    def __str__(self) -> str:
        return f"clip b={self.rows} B={self.columns} d={self.width}"


def take(rows: int, columns: int, width: int, device: torch.device, rounds: int) -> Rectangle:
    """One shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    image = measure.unit_rows(rows, width, device, dtype, 1).requires_grad_()
    text = measure.unit_rows(columns, width, device, dtype, 2).requires_grad_()
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    offset = (columns // rows // 2) * rows

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return softmax_contrastive(*tensors, offset=offset).mean()

    inputs = (image, text, scale)
    calls = {"both": partial(forward_backward, loss, inputs), "forward": partial(forward, loss, inputs)}
    found = measure.interleaved(calls, rounds, device)
    extra = measure.extra_memory_bytes(calls["both"], device)
    return Rectangle(rows, columns, width, found["forward"].median, found["both"].median, extra)


def grid(shapes: Sequence[tuple[int, int, int]], device: torch.device, budget: Budget, rounds: int) -> list[Rectangle]:
    """Those of the shapes for which there is time."""
    return [
        take(rows, columns, width, device, rounds)
        for rows, columns, width in shapes
        if rows <= columns and budget.allows(f"rectangle b={rows} B={columns} d={width}", seconds=2)
    ]


def records(device: torch.device, budget: Budget, rounds: int) -> list[Record]:
    """Seconds and memory of each rank's share, beside what counting predicts."""
    shapes = [(b, columns, 512) for b, columns in product(ROWS, COLUMNS)]
    return [record for found in grid(shapes, device, budget, rounds) for record in described(found, device)]


def described(found: Rectangle, device: torch.device) -> list[Record]:
    record = partial(Record, "rectangles", str(found))
    predicted = extra_memory_bytes("clip", found.rows, found.columns, found.width, 2 if device.type == "cuda" else 4)
    return [
        record("forward_seconds", found.forward_s, "s"),
        record("forward_backward_seconds", found.both_s, "s"),
        record("extra_memory_bytes", found.extra_bytes, "B"),
        record("predicted_extra_memory_bytes", predicted, "B"),
    ]
