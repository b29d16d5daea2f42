"""Who keeps the others waiting: from every rank's heartbeat, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pretrain.watch.beats import Beat, condition

NAMED = 8
"""Ranks that a report names; the rest are counted."""


@dataclass(frozen=True)
class Stall:
    """Why a run stands still, as seen at one moment."""

    behind: tuple[int, ...]
    """Ranks that the others wait for; empty: all are at the same point."""
    writer: int | None
    """The rank that tells: the first that gives signs of life and is not behind; None: there is none."""
    lines: tuple[str, ...]


def find(beats: Sequence[Beat], size: int, now: str) -> Stall:
    """Who is behind, and what with.

    Args:
        beats: of the ranks that have written one.
        size: ranks of the run.
        now: UTC, ISO 8601.
    """
    missing = sorted(set(range(size)) - {beat.rank for beat in beats})
    lost = {beat.rank: reason for beat in beats if (reason := condition(beat))}
    alive = [beat for beat in beats if beat.rank not in lost]
    furthest = max(alive, key=lambda beat: beat.where, default=None)
    late = [b for b in alive if furthest and b.where < furthest.where and not missing and not lost]
    first = min((beat.where for beat in late), default=None)
    slow = {beat.rank for beat in late if beat.where == first}
    waiting = [beat for beat in alive if furthest and beat.where == furthest.where]
    lines = [f"rank {rank} has given no sign at all in this start" for rank in missing]
    for beat in beats:
        if beat.rank in lost:
            lines.append(f"{beat} {lost[beat.rank]}; it was in phase {beat.place} at step {beat.step}")
        elif beat.rank in slow:
            lines.append(f"{beat} is in phase {beat.place} since {_seconds(beat.since, now)} s at step {beat.step}")
        else:
            continue
        lines[-1] += _missed(beat, furthest, len(waiting))
    behind = tuple(sorted({*missing, *lost, *slow}))
    writer = next((beat.rank for beat in alive if beat.rank not in behind), None)
    return Stall(behind, writer, tuple(_shorten(lines) or _together(alive, now)))


def _missed(beat: Beat, furthest: Beat | None, waiting: int) -> str:
    """What others wait in that this rank has not come to."""
    if furthest is None or beat.where >= furthest.where:
        return ""
    ranks = "1 rank waits" if waiting == 1 else f"{waiting} ranks wait"
    if beat.calls < furthest.calls:
        return f", and never entered collective no. {furthest.calls}, {furthest.call}, in which {ranks}"
    return f", and has not come to phase {furthest.place} of step {furthest.step}, in which {ranks}"


def _together(alive: Sequence[Beat], now: str) -> list[str]:
    if not alive:
        return []
    one = alive[0]
    return [
        f"all {len(alive)} ranks are in phase {one.place} since {_seconds(one.since, now)} s at step {one.step}: "
        "a network, disk or device that does not answer"
    ]


def _shorten(lines: list[str]) -> list[str]:
    rest = len(lines) - NAMED
    return [*lines[:NAMED], f"and {rest} more ranks"] if rest > 0 else lines


def _seconds(since: str, now: str) -> int:
    return round((datetime.fromisoformat(now) - datetime.fromisoformat(since)).total_seconds())
