"""What the two contrastive losses' benchmarks share: the forms that run here, in turns; a GPU's peak; the tuner."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pretrain.kernels import tile_shapes, timing
from pretrain.kernels.dispatch import has_triton

Loss = Callable[[Tensor, Tensor, str], Tensor]
"""rows, columns, impl -> a scalar."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEAK = 8192
"""Edge of the matrix product that stands for what the GPU can do."""


def run(loss: Loss, kernel: str, forward_passes: int, total_passes: int, description: str) -> None:
    """The command line of a loss whose forward and whole step take so many products of all rows with all columns."""
    asked = arguments(description)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, columns = (unit(count, asked.width, DTYPES[asked.dtype], device) for count in (asked.rows, asked.columns))
    if asked.tune:
        tune(loss, kernel, rows, columns, asked.rounds)
        return
    before = peak(rows)
    found = timing.milliseconds(calls(loss, rows, columns), asked.rounds, device)
    after = peak(rows)
    case = f"B={asked.rows} M={asked.columns} D={asked.width} {asked.dtype}"
    print(timing.table({case: found}))
    if before is not None and after is not None:
        print(f"\n{PEAK}^3 matmul on such data: {before:.0f} TFLOP/s before, {after:.0f} after\n")
        for name, milliseconds in found.items():
            passes = total_passes if name.endswith("+ backward") else forward_passes
            rate = passes * 2e-9 * len(rows) * len(columns) * asked.width / milliseconds
            print(
                f"{name}: {rate:.0f} TFLOP/s of {passes} passes, {200 * rate / (before + after):.0f} % of the matmul's"
            )


def arguments(description: str) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, default=16384 if cuda else 1024)
    parser.add_argument("--columns", type=int, default=16384 if cuda else 1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--rounds", type=int, default=50 if cuda else 5)
    parser.add_argument("--tune", action="store_true", help="time the candidate tiles of the Triton form; needs CUDA")
    asked = parser.parse_args()
    if asked.tune and not cuda:
        parser.error("--tune needs a CUDA device")
    return asked


def unit(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, width] random directions: zeros or whole numbers draw less power and flatter a GPU."""
    generator = torch.Generator(device).manual_seed(count)
    return normalize(torch.randn(count, width, device=device, generator=generator), dim=1).to(dtype)


def calls(loss: Loss, rows: Tensor, columns: Tensor) -> dict[str, Callable[[], Any]]:
    """The forms that run on these tensors, each forward alone and with its gradients."""
    found: dict[str, Callable[[], Any]] = {}
    forms = ["reference", "blockwise", *(["triton"] if rows.is_cuda and has_triton() else [])]
    if rows.is_cuda and len(rows) * len(columns) > 1 << 30:
        forms.remove("reference")  # holds all logits several times
    for form in forms:
        found[form] = partial(loss, rows, columns, form)
        found[f"{form} + backward"] = partial(step, loss, rows, columns, form)
    return found


def step(loss: Loss, rows: Tensor, columns: Tensor, form: str) -> None:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in (rows, columns)]
    torch.autograd.grad(loss(leaves[0], leaves[1], form), leaves)


def peak(like: Tensor) -> float | None:
    """TFLOP/s of a large matrix product on such data; None where there is no GPU."""
    if not like.is_cuda:
        return None
    left, right = (unit(PEAK, PEAK, like.dtype, like.device) for _ in range(2))
    found = timing.milliseconds({"matmul": lambda: left @ right}, 50, like.device)["matmul"]
    return 2e-9 * PEAK**3 / found


def tune(loss: Loss, kernel: str, rows: Tensor, columns: Tensor, rounds: int) -> None:
    """A table of every candidate tile; those a GPU cannot hold are named."""
    from triton.runtime.errors import TritonError  # only with CUDA, where triton is

    cases: dict[str, dict[str, float]] = {}
    for tile in dict.fromkeys([tile_shapes.choose(kernel, rows), *tile_shapes.CANDIDATES]):  # type: ignore[arg-type]
        name = " ".join(f"{field}={value}" for field, value in tile._asdict().items())
        with tile_shapes.forced(tile):
            own = {name: call for name, call in calls(loss, rows, columns).items() if name.startswith("triton")}
            try:
                cases[name] = timing.milliseconds(own, rounds, rows.device)
            except (TritonError, RuntimeError) as error:  # more shared memory or registers than there are
                print(f"{name}: {type(error).__name__}: {error}")
    print("the first line is the tile of the table\n")
    print(timing.table(cases))
