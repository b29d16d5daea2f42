"""What a verb found, on standard output."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from typing import Any


def show(result: Any, as_json: bool) -> None:
    """A result for a person, a line a fact, or as one JSON object."""
    facts = dataclasses.asdict(result) if dataclasses.is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        print(json.dumps(facts, default=str))
        return
    rows = [row for name, value in facts.items() for row in _rows(name, value)]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:{width}}  {f'{value:.4f}' if isinstance(value, float) else value}")


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows of equally many cells as lines, each column as wide as its widest cell.

    Args:
        right: columns whose cells end below each other.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{'>' if n in right else '<'}{width}" for n, width in enumerate(widths)]
    return ["  ".join(map(format, row, forms)).rstrip() for row in rows]


def duration(seconds: float | None) -> str:
    """'2d 03:04:05' or '03:04:05'; '?' where nobody knows."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


def age(seconds: float | None) -> str:
    """How long ago, roughly: '3 s', '5 min', '2 h', '4 d'; '?' where nobody knows."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _rows(name: str, value: Any) -> list[tuple[str, Any]]:
    """Facts of facts, and lines of text, get a line each."""
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in _rows(f"{name} {key}".rstrip(), part)]
    if isinstance(value, list | tuple) and all(isinstance(line, str) for line in value):
        return [(name, line) for line in value]
    return [(name, value)]
