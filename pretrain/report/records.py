"""metrics.jsonl as columns that can be drawn: every loss, and the rest from as many records as a page can show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.history import curve, lines

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A curve of a name. Samples ascend; NaN, where a value was not finite or not written, is a gap."""

    name: str
    x: Numbers
    """[n] fp64."""
    y: Numbers
    """[n] fp64."""

    @property
    def last(self) -> float | None:
        """The newest finite value."""
        good = self.y[np.isfinite(self.y)]
        return float(good[-1]) if len(good) else None

    def thinned(self, buckets: int) -> Line:
        """The smallest and the largest value of each of `buckets` stretches of records: no peak is lost."""
        if len(self.x) <= 2 * buckets:
            return self
        edges = np.linspace(0, len(self.x), buckets + 1).astype(int)
        pairs = itertools.pairwise(edges)
        kept = sorted({int(n) for start, stop in pairs for n in _extremes(self.y[start:stop], start)})
        return Line(self.name, self.x[kept], self.y[kept])


@dataclass(frozen=True)
class Columns:
    """The numbers of a run's records, by 'outer/inner' name."""

    samples: Numbers = field(default_factory=lambda: np.empty(0))
    values: Mapping[str, Numbers] = field(default_factory=dict)
    loss: Line = field(default_factory=lambda: Line("loss", np.empty(0), np.empty(0)))
    """Of every record."""

    def line(self, name: str, title: str | None = None, unit: float = 1.0) -> Line | None:
        """A column as a curve; None where no record has a finite value there.

        Args:
            unit: that the values are divided by.
        """
        if name == "loss":
            found = self.loss
        else:
            found = Line(name, self.samples, self.values.get(name, np.full(len(self.samples), np.nan)))
        if found.last is None:
            return None
        return Line(title or name, found.x, found.y / unit)

    def under(self, prefix: str) -> list[str]:
        """Names of the columns of a mapping, without its own."""
        return [name.removeprefix(prefix) for name in self.values if name.startswith(prefix)]


def read(run: Path) -> Columns:
    """What is logged so far; a record takes the place of those of its own and later samples.

    Files above `lines.SMALL` bytes are read in full for the loss, and in some places for everything else.
    """
    kept: list[dict[str, float]] = []
    for record in lines.thinned(run / "metrics.jsonl"):
        if isinstance(record.get("samples"), int):
            while kept and kept[-1]["samples"] >= record["samples"]:
                kept.pop()
            kept.append(dict(_flat(record)) | _wait(record))
    names = dict.fromkeys(name for record in kept for name in record)
    values = {name: np.array([record.get(name, np.nan) for record in kept]) for name in names}
    found = curve.read(run / "metrics.jsonl")
    samples = values.get("samples", np.empty(0))
    return Columns(samples, values, Line("loss", found.samples, found.loss))


def _wait(record: Mapping[str, Any]) -> dict[str, float]:
    step_s, wait_s = (curve.finite(record.get(name)) for name in ("step_s", "data_wait_s"))
    return {"data_wait": 100 * wait_s / step_s} if step_s and wait_s is not None else {}


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif not isinstance(value, bool) and (number := curve.finite(value)) is not None:
            yield f"{prefix}{name}", number


def _extremes(values: Numbers, start: int) -> tuple[int, ...]:
    good = np.flatnonzero(np.isfinite(values))
    if not len(good):
        return (start,)
    part = values[good]
    gap = () if len(good) == len(values) else (start + int(np.flatnonzero(~np.isfinite(values))[0]),)
    return (start + int(good[part.argmin()]), start + int(good[part.argmax()]), *gap)
