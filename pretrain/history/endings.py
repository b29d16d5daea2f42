"""How a start of a run has ended, or that it has not: from what every rank last said of itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import DONE, REQUEUE
from pretrain.watch.beats import BEFORE, Beat, running

NAMED = 8


@dataclass(frozen=True)
class Signs:
    """Heartbeats of one start."""

    beats: tuple[Beat, ...]
    newest: float | None
    """When the newest was written, by the clock of its file system; seconds since 1970."""

    @property
    def step(self) -> int | None:
        """The furthest that a rank has come."""
        return max((beat.step for beat in self.beats), default=None)


def read(folder: Path) -> Signs:
    """The heartbeats in a folder that another process may replace meanwhile; what cannot be read is missing."""
    found: list[tuple[float, dict[str, Any]]] = []
    for path in sorted(folder.glob("rank_*.json")):
        with suppress(OSError, ValueError):
            found.append((path.stat().st_mtime, json.loads(path.read_text())))
    newest = max((when for when, _ in found), default=None)
    beats: list[Beat] = []
    for when, facts in found:
        with suppress(TypeError):  # another version's
            beats.append(Beat(**facts, age_s=(newest or when) - when))
    return Signs(tuple(beats), newest)


def before(run_folder: Path) -> dict[str, Any] | None:
    """How far the start before this one came, and how it ended; None: there was none, or it left nothing."""
    signs = read(run_folder / BEFORE)
    return {"step": signs.step, "reason": reason(signs.beats)} if signs.beats else None


def reason(beats: Sequence[Beat]) -> str:
    """Why a start that is over has ended, in a few words."""
    if silent := [beat for beat in beats if beat.code is None]:
        return f"{ranks(silent)} left no exit code: killed, or the machine is gone"
    failed = [beat for beat in beats if beat.code not in (DONE, REQUEUE)]
    if failed:
        first = next((beat for beat in failed if not str(beat.reason).startswith("RanksLost")), failed[0])
        return f"rank {first.rank} ended with exit code {first.code}: {first.reason or 'no reason given'}"
    stopped = next((beat for beat in beats if beat.code == REQUEUE), None)
    return "finished" if stopped is None else (stopped.reason or "stopped").removeprefix("Stopped: ")


def gone(beats: Sequence[Beat]) -> list[Beat]:
    """Ranks of this machine whose process is no more, though it said nothing of ending."""
    return [beat for beat in beats if beat.code is None and running(beat.host, beat.pid) is False]


def ranks(beats: Sequence[Beat]) -> str:
    """'rank 3' or 'ranks 0, 1, 2'."""
    named = ", ".join(str(beat.rank) for beat in beats[:NAMED]) + (", ..." if len(beats) > NAMED else "")
    return f"rank{'s' * (len(beats) > 1)} {named}"
