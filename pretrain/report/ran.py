"""Everything that a run's folder tells, as far as it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.history import curve, folder, lines, status
from pretrain.history.compared import short_names
from pretrain.history.status import Status
from pretrain.report import marks, records

_NO_RESULT = ("step", "world_size", "seconds", "samples", "classes", "images", "texts", "pairs", "left_out")


@dataclass(frozen=True)
class Result:
    """A measurement of `pretrain evaluate`, or of training."""

    task: str
    """'TASK', or 'TASK (plain)' for the weights beside an average."""
    step: int
    numbers: Mapping[str, float]
    per_class: Mapping[str, float]


@dataclass(frozen=True)
class Ran:
    """A run as its folder shows it."""

    path: Path
    name: str
    """As short as tells the runs of a report apart."""
    config: Mapping[str, Any]
    status: Status
    columns: records.Columns
    marks: Sequence[marks.Mark]
    results: Sequence[Result]
    """Steps ascending."""
    batch: int
    """Samples of a step."""


def read(runs: Sequence[Path]) -> list[Ran]:
    """The runs in some folders, which may be written meanwhile.

    Raises:
        UserError: one is no run folder, or its config is no YAML.
    """
    names = short_names([str(run) for run in runs])
    return [_one(run, name) for run, name in zip(runs, names, strict=True)]


def _one(run: Path, name: str) -> Ran:
    found, config = status.read(run), folder.config(run)
    columns = records.read(run)
    batch = folder.knob(config, "train", "global_batch")
    batch = batch if isinstance(batch, int) else _batch(columns)
    return Ran(run, name, config, found, columns, marks.of(found, batch), _results(run), batch)


def _batch(columns: records.Columns) -> int:
    step = columns.values.get("step")
    return int(columns.samples[-1] / step[-1]) if step is not None and len(step) and step[-1] else 1


def _results(run: Path) -> list[Result]:
    found = []
    for path in sorted((run / "eval").glob("*.json")):
        result = lines.document(path)
        if isinstance(result, dict) and isinstance(result.get("step"), int) and "task" in result:
            plain = " (plain)" if path.stem.endswith("_plain") else ""
            classes = result.get("per_class")
            classes = classes if isinstance(classes, dict) else {}
            found.append(Result(f"{result['task']}{plain}", result["step"], _numbers(result), _numbers(classes)))
    return sorted(found, key=lambda result: result.step)


def _numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: curve.finite(value) for name, value in tree.items() if not isinstance(value, bool)}
    return {str(name): value for name, value in numbers.items() if value is not None and name not in _NO_RESULT}
