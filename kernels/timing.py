"""How the forms of a kernel are timed: in turns, by medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def milliseconds(calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median time of each call; they take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # compile, allocate, warm the caches
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def table(cases: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a line a case, a column a form, in milliseconds."""
    forms = list(dict.fromkeys(form for found in cases.values() for form in found))
    lines = [f"| ms | {' | '.join(forms)} |", "|---" * (len(forms) + 1) + "|"]
    for case, found in cases.items():
        lines.append(f"| {case} | {' | '.join(f'{found[form]:.3g}' if form in found else '' for form in forms)} |")
    return "\n".join(lines)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
