"""Axes: round ticks, short numbers, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DECADES = 30.0
"""Largest over smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Axis:
    """A span of values on a span of the picture."""

    low: float
    high: float
    start: float
    """Where `low` lies, in units of the picture."""
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; the axis' ends hold what is beyond them."""
        low, high, value = (self._scaled(one) for one in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values on the axis, ascending."""
        if self.log:
            return _decades(self.low, self.high, most)
        step = _round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def around(values: Sequence[float], start: float, stop: float, floor: float | None = None) -> Axis:
    """The axis that holds values, with some air.

    Args:
        values: finite.
        floor: a value that belongs on the axis, such as 0 of a rate.
    """
    seen = [*values, *([] if floor is None else [floor])] or [0.0, 1.0]
    low, high = min(seen), max(seen)
    if low > 0 and high / low > DECADES:
        return Axis(low / 1.2, high * 1.2, start, stop, log=True)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low if low == floor else low - air, high + air, start, stop)


def short(value: float | None, digits: int = 4) -> str:
    """A number in at most about six characters: 12.3k, 0.0312, 1e-08."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (size if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:.{digits}g}"


def place(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, not below `step`."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step * (1 - 1e-9))


def _decades(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    every = max(1, math.ceil((last - first + 1) / most))
    tens = [10.0**n for n in range(first, last + 1, every)]
    if len(tens) > 2:
        return tens
    return [n * 10.0**k for k in range(first - 1, last + 1) for n in (1, 2, 5) if low <= n * 10.0**k <= high]
