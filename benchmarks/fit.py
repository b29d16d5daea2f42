"""How well the cost model of compute describes what was measured: fitted on two thirds, judged on the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Fit:
    """seconds = operations / rate + start"""

    rate: float
    """FLOP/s"""
    start: float
    """Seconds that any call takes."""

    def seconds(self, operations: float) -> float:
        return operations / self.rate + self.start


Point = tuple[float, float]
"""Operations, seconds."""


def fit(points: Sequence[Point]) -> Fit:
    """The smallest sum of squared relative errors, which is linear in 1 / rate and start.

    Raises:
        ValueError: fewer than two different numbers of operations.
    """
    if len({operations for operations, _ in points}) < 2:
        raise ValueError(f"{len(points)} points do not tell a rate from a start: measure two different sizes")
    # Normal equations for a x + b = 1 with x = operations / seconds and y = 1 / seconds.
    rows = [(operations / seconds, 1 / seconds) for operations, seconds in points]
    xx, xy, yy = (math.fsum(one[i] * one[j] for one in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = (math.fsum(one[i] for one in rows) for i in (0, 1))
    determinant = xx * yy - xy * xy
    inverse, start = (x * yy - y * xy) / determinant, (xx * y - xy * x) / determinant
    if start < 0 or inverse <= 0:  # no call takes less than no time: the rate alone
        inverse, start = x / xx, 0.0
    return Fit(1 / inverse, start)


def held_out(points: Sequence[Point]) -> tuple[Fit, list[float]]:
    """The fit of two thirds of the points, every third one left out, and its relative errors on those."""
    ordered = sorted(points)
    seen = [point for n, point in enumerate(ordered) if n % 3 != 1]
    unseen = [point for n, point in enumerate(ordered) if n % 3 == 1]
    found = fit(seen)
    return found, [abs(found.seconds(operations) / seconds - 1) for operations, seconds in unseen]


def summary(errors: Sequence[float]) -> tuple[float, float]:
    """Median and largest."""
    return median(errors), max(errors)
