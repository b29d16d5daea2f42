"""The drill's findings: a line for each fault."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What became of one fault."""

    name: str
    what: str
    ends: tuple[str, ...]
    """Of each start, how its ranks ended."""
    weights: str
    """equal, different."""
    took_s: float
    problems: tuple[str, ...]
    """Empty where all was as it should be."""

    @property
    def good(self) -> bool:
        return not self.problems


_FORM = "{:27} {:60} {:40} {:9} {:>5}"


def tell(row: Row, as_json: bool, first: bool) -> None:
    """Print a finding; above the first one, what the columns are."""
    if as_json:
        print(json.dumps(dataclasses.asdict(row) | {"good": row.good}), flush=True)
        return
    print(*([HEAD] if first else []), line(row), sep="\n", flush=True)
    for problem in row.problems:
        print(f"    FAILED: {problem}", flush=True)


def line(row: Row) -> str:
    """A finding as a line of the table."""
    return _FORM.format(row.name, row.what, ", ".join(row.ends), row.weights, f"{row.took_s:.1f}")


HEAD = _FORM.format("fault", "what happens", "how the ranks of each start ended", "weights", "s")


def tell_end(rows: Sequence[Row], took_s: float, as_json: bool) -> None:
    """Print the sum: how many faults, how many good, how long in all."""
    bad = [row.name for row in rows if not row.good]
    if not as_json:
        print(f"{len(rows)} faults, {len(rows) - len(bad)} as they should be, {took_s:.0f} s")
        print(f"failed: {', '.join(bad)}" if bad else "every run ended with the weights of the undisturbed one")
