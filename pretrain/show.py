"""What a verb found, on standard output."""

from __future__ import annotations

import dataclasses
import json
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


def _rows(name: str, value: Any) -> list[tuple[str, Any]]:
    """Facts of facts, and lines of text, get a line each."""
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in _rows(f"{name} {key}".rstrip(), part)]
    if isinstance(value, list | tuple) and all(isinstance(line, str) for line in value):
        return [(name, line) for line in value]
    return [(name, value)]
