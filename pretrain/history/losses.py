"""Losses of runs at the same samples, and whether they saw the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.history.curve import Curve, Numbers, finite

SHOWN = 8
"""Points of the table."""


def losses(curves: Sequence[Curve]) -> dict[str, Any]:
    """Losses of all runs at SHOWN samples that all have seen, and the distance of each run to the first; as JSON."""
    return {
        "final": [{"samples": finite(c.samples[-1]) if len(c) else None, "loss": c.final} for c in curves],
        "at": _table(curves),
        "against_first": [_distance(curves[0], other) for other in curves[1:]],
        "batches": [_batches(curves[0], other) for other in curves[1:]],
    }


def _table(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Where all runs logged the same samples, these; else those of the first, and the others between their own."""
    if not all(len(curve) for curve in curves):
        return []
    points = curves[0].samples
    for other in curves[1:]:
        points = points[np.isin(points, other.samples)]
    points = points if len(points) else _inside(curves)
    chosen = points[np.unique(np.linspace(0, len(points) - 1, min(SHOWN, len(points))).round().astype(int))]
    values = [_at(curve, chosen) for curve in curves]
    return [
        {"samples": int(point), "loss": [finite(float(value[n])) for value in values]} for n, point in enumerate(chosen)
    ]


def _distance(one: Curve, other: Curve) -> dict[str, Any]:
    """Of two curves, at every point of the first where both are."""
    if not (len(one) and len(other)):
        return {"points": 0, "interpolated": False, "mean_abs": None, "max_abs": None, "max_at": None, "mean": None}
    common = one.samples[np.isin(one.samples, other.samples)]
    points = common if len(common) else _inside([one, other])
    apart = _at(other, points) - _at(one, points)
    good = np.isfinite(apart)
    points, apart = points[good], apart[good]
    found: dict[str, Any] = {"points": len(points), "interpolated": not len(common) and len(points) > 0}
    if not len(points):
        return found | {"mean_abs": None, "max_abs": None, "max_at": None, "mean": None}
    worst = int(np.abs(apart).argmax())
    found |= {"mean_abs": float(np.abs(apart).mean()), "max_abs": float(np.abs(apart[worst]))}
    return found | {"max_at": int(points[worst]), "mean": float(apart.mean())}


def _batches(one: Curve, other: Curve) -> dict[str, Any]:
    """Whether batches were the same where both runs logged their digests at the same samples."""
    _, mine, theirs = np.intersect1d(one.samples, other.samples, return_indices=True)
    both = (one.digests[mine] != 0) & (other.digests[theirs] != 0)
    same = one.digests[mine][both] == other.digests[theirs][both]
    differing = one.samples[mine][both][~same]
    first = int(differing[0]) if len(differing) else None
    return {"compared": len(same), "same": int(same.sum()), "first_difference": first}


def _inside(curves: Sequence[Curve]) -> Numbers:
    """Points of the first curve that lie within all of them."""
    start, stop = max(c.samples[0] for c in curves), min(c.samples[-1] for c in curves)
    points = curves[0].samples
    inside: Numbers = points[(points >= start) & (points <= stop)]
    return inside


def _at(curve: Curve, points: Numbers) -> Numbers:
    return np.interp(points, curve.samples, curve.loss)
