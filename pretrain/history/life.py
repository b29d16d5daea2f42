"""Whether a run runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain.errors import DONE, REQUEUE
from pretrain.history import endings, lines
from pretrain.history.endings import Signs
from pretrain.watch.beats import FOLDER, condition, running

SILENT_S = 60.0
"""Heartbeats are written every two seconds; a file system between machines may hold one back for some more."""


@dataclass(frozen=True)
class Life:
    """What a run does now, or how it ended."""

    state: str
    """starting, running, stalled, silent (no sign for long; nobody here knows why), stopped (by a signal, to be started
    again), finished, failed, dead (killed), unknown."""
    detail: str
    """In a few words; may be ''."""
    hosts: tuple[str, ...]
    ranks: int
    """Of which there is a sign."""
    attempts: int
    """Starts, those of which nothing but their number is left included."""
    step: int | None
    """The furthest that a rank has said to be."""
    last_sign: str | None
    """UTC, ISO 8601."""
    age_s: float | None
    """Seconds since then."""

    @property
    def is_over(self) -> bool:
        return self.state in ("stopped", "finished", "failed", "dead")


def read(run: Path, now: float | None = None) -> Life:
    """What the run in a folder does.

    Args:
        now: seconds since 1970.
    """
    now, signs = now or time.time(), endings.read(run / FOLDER)
    attempts = sorted((run / "attempts").glob("*.json"))
    latest = lines.document(attempts[-1]) if attempts else None
    state, detail = _unseen(latest, signs, run) or _seen(signs, run / "stalls.jsonl", latest, now)
    return Life(
        state=state,
        detail=detail,
        hosts=tuple(dict.fromkeys(beat.host for beat in signs.beats)),
        ranks=len(signs.beats),
        attempts=len(attempts),
        step=signs.step,
        last_sign=stamp(signs.newest) if signs.newest else None,
        age_s=round(max(0.0, now - signs.newest), 1) if signs.newest else None,
    )


def stamp(seconds: float) -> str:
    """A moment as UTC in ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _unseen(attempt: Any, signs: Signs, run: Path) -> tuple[str, str] | None:
    """Of a start that has taken the folder and no more: older heartbeats say nothing of it."""
    if not isinstance(attempt, dict) or not {"time", "host", "pid"} <= set(attempt):
        begun = ("unknown", "it has begun, and no heartbeat lies in it") if lines.tail(run / "events.jsonl") else None
        return None if signs.beats else begun or ("starting", "")
    if signs.newest is not None and stamp(signs.newest) >= attempt["time"]:
        return None
    who = f"process {attempt['pid']} on {attempt['host']}"
    if running(attempt["host"], attempt["pid"]) is False:
        return "dead", f"{who} is gone, and it left no sign of life"
    return "starting", f"{who} took the folder at {attempt['time']}"


def _seen(signs: Signs, stalls: Path, attempt: Any, now: float) -> tuple[str, str]:
    if dead := endings.gone(signs.beats):
        return "dead", f"{endings.ranks(dead)} of {dead[0].host}: no such process, and no exit code was left"
    codes = {beat.code for beat in signs.beats}
    if None not in codes:
        state = "finished" if codes == {DONE} else "stopped" if codes <= {DONE, REQUEUE} else "failed"
        return state, "" if state == "finished" else endings.reason(signs.beats)
    assert signs.newest is not None
    if now - signs.newest > SILENT_S:
        return "silent", f"no sign since {stamp(signs.newest)}: killed with its machine, or its disk refuses"
    alive, (last, *_) = [beat for beat in signs.beats if beat.code is None], [*lines.tail(stalls)[-1:], {}]
    told, began = str(last.get("time", "")), str((attempt or {}).get("time", ""))
    if told > began and all(beat.since < told for beat in alive):  # each has been where it is since before
        return "stalled", "; ".join(map(str, last.get("lines", ())))
    odd = [f"rank {beat.rank} {reason}" for beat in alive if (reason := condition(beat))]
    return "running", "; ".join(["some ranks have ended"] * (len(codes) > 1) + odd[:3])
