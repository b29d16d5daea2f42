"""What timing the phases of a step costs: `python -m benchmarks.phases`, one JSON object.

The cost of a phase is the median of many, with a timer and without; a step's share is that times the phases that a step
of configs/debug.yaml enters, by the time it takes. On a GPU a phase records two events.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import Call, interleaved
from pretrain import runfile
from pretrain.phases import listening, phase
from pretrain.profiling.timer import STEP, timer
from pretrain.signals import StopRequest
from pretrain.train import train

PHASES, ROUNDS = 2000, 30
STEPS = 20
"""Of configs/debug.yaml."""


class Counting:
    """A listener that counts the phases of steps."""

    def __init__(self) -> None:
        self.entered: Counter[str] = Counter()

    def enter(self, name: str, detail: str) -> None:
        self.entered[name] += 1

    def leave(self, name: str) -> None:
        return


def enter_many(timed: bool, device: torch.device) -> None:
    """PHASES of them, and one look at the timer, as at a logged step."""
    listener = timer(device)
    with listening(*([listener] if timed else [])):
        for _ in range(PHASES):
            with phase("loss"):
                pass
    if timed:
        listener.take()


def main() -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls: dict[str, Call] = {"without": partial(enter_many, False, device), "with": partial(enter_many, True, device)}
    each = {name: timing.median / PHASES for name, timing in interleaved(calls, ROUNDS, torch.device("cpu")).items()}
    counted = Counting()
    with tempfile.TemporaryDirectory() as folder, listening(counted):
        train(runfile.load("configs/debug.yaml", ["--folder", folder]), StopRequest())
        lines = (Path(folder) / "debug" / "metrics.jsonl").read_text().splitlines()
    step_s = sorted(json.loads(line)["step_s"] for line in lines)[len(lines) // 2]
    phases = sum(counted.entered[name] for name in (*STEP, "agreeing", "logging")) / STEPS
    cost_us = 1e6 * (each["with"] - each["without"])
    found = {"device": device.type, "us_a_phase": {name: round(1e6 * cost, 2) for name, cost in each.items()}}
    print(json.dumps(found | {"phases_a_step": phases, "step_s": step_s, "share": cost_us * 1e-6 * phases / step_s}))


if __name__ == "__main__":
    main()
