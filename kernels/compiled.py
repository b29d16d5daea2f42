"""Compile the pairwise Triton kernels for GPUs that are not here, and say what they need of them.

    python -m pretrain.kernels.compiled [--capability 90] [--all] [--only TEXT] [--json]

What is compiled is what the host code launches: it runs on CPU tensors, and its launches stop at the compiled program.
Nothing is executed on a GPU, so nothing is said about results or speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from pretrain.kernels import tile_shapes
from pretrain.kernels.pairing import Duplicates, Pairing, Span
from pretrain.kernels.sigmoid_contrastive import kernel as sigmoid
from pretrain.kernels.softmax_contrastive import kernel as softmax
from pretrain.kernels.softmax_contrastive.statistics import Shifts, Weights

EVEN, RAGGED = (512, 1024), (300, 517)
KINDS: list[Duplicates] = ["negatives", "ignore", "positives"]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """One way to call the kernels."""

    dtype: torch.dtype
    width: int
    shape: tuple[int, int] = EVEN
    kind: Duplicates = "negatives"
    tracked: bool = False
    gradient_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return " ".join(str(value).removeprefix("torch.") for value in asdict(self).values() if value is not None)


@dataclass(frozen=True)
class Need:
    """What one compiled program takes of a processor."""

    kernel: str
    case: str
    capability: int
    tile: str
    registers: int
    stack_bytes: int
    """Of which each thread has so many: above 0, registers are spilled."""
    shared_bytes: int
    wgmma: int
    """Asynchronous matrix instructions of Hopper, counted in its PTX."""
    mma: int
    """Those that every GPU since Ampere has."""
    cp_async: int
    """Copies from global to shared memory that nobody waits for at once."""


def cases(everything: bool) -> Iterator[Case]:
    """The usual ones; or every combination of compile-time constants that occurs."""
    for width in (512, 768, 1024):
        yield Case(torch.bfloat16, width)
    yield Case(torch.float16, 512)
    if not everything:
        return
    for shape, kind, tracked in product((EVEN, RAGGED), KINDS, (False, True)):
        yield Case(torch.bfloat16, 512, shape, kind, tracked)
    for kind, tracked in product(KINDS, (False, True)):
        yield Case(torch.float16, 768, RAGGED, kind, tracked)
        yield Case(torch.float32, 100, RAGGED, kind, tracked)
    for width in (1, 100, 648, 1152, 2048):
        yield Case(torch.bfloat16, width, RAGGED)
    yield Case(torch.float32, 512)
    yield Case(torch.float16, 512, gradient_dtype=torch.bfloat16)
    yield Case(torch.bfloat16, 512, gradient_dtype=torch.float32)


def call(case: Case) -> None:
    """Every kernel in one case; what the launches would have computed is not there, so nothing comes back."""
    count, among = case.shape
    rows, columns = (torch.zeros(n, case.width, dtype=case.dtype) for n in case.shape)
    ids = [torch.arange(n) if case.kind != "negatives" else None for n in case.shape]
    pairing = Pairing(Span.at(0, count, among), case.kind, *ids)
    scale, by_row, by_column = torch.zeros(()), torch.zeros(count), torch.zeros(among)
    shifts = Shifts(by_row, by_column) if case.tracked else Shifts(scale, None)
    weights = Weights(by_row, by_column, by_row, by_column if case.kind == "positives" else None, scale)
    given = (rows, columns, scale)
    softmax.sums(*given, shifts, pairing)
    softmax.maxima(*given, pairing)
    softmax.gradients(*given, shifts, pairing, weights, None, False, case.gradient_dtype)
    for need_rows, need_bias in product((False, True), (False, True)):
        d_rows = torch.zeros(count, case.width) if need_rows else None
        sigmoid.sweep(*given, scale, pairing, d_rows, False, need_bias, case.gradient_dtype)


def compiled(case: Case, capability: int) -> Iterator[Need]:
    """The programs of a case, one after another."""
    found: list[tuple[Any, Any, dict[str, Any]]] = []
    original = triton.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((self, original(self, *args, grid=grid, warmup=True, **kwargs), kwargs))

    with (
        mock.patch.object(triton.runtime.driver, "_active", Absent(capability)),
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(tile_shapes, "capability", return_value=divmod(capability, 10)),
        mock.patch.object(tile_shapes, "processors", return_value=132),
    ):
        call(case)
    for function, program, constants in found:
        yield need(function.fn.__name__, program, constants, case, capability)


class Absent:
    """Stands in for the driver of a GPU that is not here; a number per capability keeps its programs apart."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, _: int) -> int:
        return 0


def need(kernel: str, program: Any, constants: dict[str, Any], case: Case, capability: int) -> Need:
    """Read from the binary and from its PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(program.asm["cubin"])
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    ptx, shape = program.asm["ptx"], "x".join(str(constants[name]) for name in ("ROWS", "COLUMNS", "FEATURES"))
    flags = [name.lower() for name in ("STRIP", "BIAS") if constants.get(name)]
    tile = f"{shape} w{constants['num_warps']} s{constants['num_stages']} p{constants['PARTS']}"
    return Need(
        " ".join([("sigmoid" if kernel == "_sweep" else "softmax") + kernel, *flags]),
        str(case),
        capability,
        tile,
        usage["REG"],
        usage["STACK"],
        program.metadata.shared,
        len(re.findall(r"\bwgmma\.mma_async", ptx)),
        len(re.findall(r"\bmma\.sync", ptx)),
        len(re.findall(r"\bcp\.async\.c[ag]", ptx)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[90])
    parser.add_argument("--all", action="store_true", help="every combination of compile-time constants; minutes")
    parser.add_argument("--only", default="", help="cases in whose description this stands, such as 'bfloat16 512'")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    options = parser.parse_args()
    seen: set[Need] = set()
    if not options.json:
        print(
            "| kernel | case | sm | tile | registers | stack | shared | wgmma | mma | cp.async |"
            + "\n"
            + "|---" * 10
            + "|"
        )
    chosen = [case for case in cases(options.all) if options.only in str(case)]
    for capability, case in product(options.capability, chosen):
        for one in compiled(case, capability):
            if one not in seen:
                print(json.dumps(asdict(one)) if options.json else f"| {' | '.join(map(str, asdict(one).values()))} |")
            seen.add(one)


if __name__ == "__main__":
    main()
