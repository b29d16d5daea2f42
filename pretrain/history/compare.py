"""Runs beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.history import curve, folder, knobs, lines, starts
from pretrain.history.losses import losses

_SHOWN_FACTS = ("ranks", "nodes", "device", "engine", "exchange")
_NO_RESULT = ("task", "checkpoint", "step", "average", "data", "world_size", "seconds")


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """What differs between runs, as JSON; lists have an entry for each run, `against_first` and `batches` one for each
    but the first.

    Args:
        runs: run folders.

    Raises:
        UserError: a config is no YAML.
    """
    curves = [curve.read(run / "metrics.jsonl") for run in runs]
    events = [starts.read(run).starts for run in runs]
    facts = [{name: found[-1].facts.get(name) for name in _SHOWN_FACTS} if found else {} for found in events]
    return {
        "runs": [str(run) for run in runs],
        "knobs": knobs.differing([folder.config(run) for run in runs]),
        "environment": knobs.environments(runs, facts),
        "losses": losses(curves),
        "speed": [_speed(run, found.get("ranks")) for run, found in zip(runs, facts, strict=True)],
        "evaluations": _evaluations(runs),
    }


def _speed(run: Path, ranks: int | None) -> dict[str, Any]:
    """Medians over records, of which some are taken where there are very many."""
    some = lines.thinned(run / "metrics.jsonl")
    samples_per_s, step_s, wait_s = (_median(some, name) for name in ("samples_per_s", "step_s", "data_wait_s"))
    phases = [record["phases_s"] for record in some if isinstance(record.get("phases_s"), dict)]
    names = dict.fromkeys(name for split in phases for name in split)
    peaks = [peak for record in some if isinstance(peak := record.get("peak_memory_bytes"), int)]
    return {
        "samples_per_s": samples_per_s,
        "samples_per_s_of_a_rank": samples_per_s / ranks if samples_per_s and ranks else None,
        "step_s": step_s,
        "data_wait": wait_s / step_s if step_s and wait_s is not None else None,
        "phases_s": {name: statistics.median(split.get(name, 0.0) for split in phases) for name in names},
        "peak_memory_bytes": max(peaks, default=None),
    }


def _median(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [value for record in records if (value := curve.finite(record.get(name))) is not None]
    return statistics.median(values) if values else None


def _evaluations(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Each number of each task, at the newest step that each run was measured at: a row a number."""
    newest = [_results(run) for run in runs]
    rows = []
    for task in sorted({task for found in newest for task in found}):
        results = [found.get(task, {}) for found in newest]
        names = dict.fromkeys(name for result in results for name in result if name not in _NO_RESULT)
        steps = [result.get("step") for result in results]
        for name in names:
            values = [curve.finite(result.get(name)) for result in results]
            if any(value is not None for value in values):
                rows.append({"task": task, "metric": name, "steps": steps, "values": values})
    return rows


def _results(run: Path) -> dict[str, dict[str, Any]]:
    """By task, 'TASK (plain)' being that of the weights beside an average."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((run / "eval").glob("*.json")):  # names end in steps of equal width
        result = lines.document(path)
        if isinstance(result, dict) and isinstance(result.get("step"), int) and "task" in result:
            plain = " (plain)" if path.stem.endswith("_plain") else ""
            before = found.get(f"{result['task']}{plain}")
            if before is None or result["step"] >= before["step"]:
                found[f"{result['task']}{plain}"] = result
    return found
