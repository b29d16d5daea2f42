"""Peak extra memory of losses on a CPU, in a process of its own: one whose allocator never keeps what was freed.

Blocks that an allocator keeps would count as in use, and a process that keeps none is slower: no timing is taken here.
Standard input is JSON, [loss, size, width, threads, sides] a case; so is every line of the output, side -> bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import measure
from benchmarks.peers import Case, Side, forward_backward, sides
from benchmarks.report import ROOT


def apart(cases: Sequence[tuple[Case, Sequence[Side]]], threads: int) -> list[dict[Side, int]]:
    """Bytes of each side in each case."""
    asked = [[case.loss, case.size, case.width, threads, list(wanted)] for case, wanted in cases]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(f"measuring memory ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    measure.keep_nothing_freed()
    device = torch.device("cpu")
    for loss, size, width, threads, wanted in json.load(sys.stdin):
        torch.set_num_threads(threads)
        case = Case(loss, size, width, torch.float32)
        inputs, found = case.inputs(device), {}
        for side, function in sides(case, device).items():
            if side in wanted:
                call = partial(forward_backward, function, inputs)
                call()  # what a first call leaves behind for good, such as a library's workspace, is not extra
                found[side] = measure.extra_memory_bytes(call, device)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
