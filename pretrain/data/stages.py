"""Where the time of the data pipeline goes, and which stage holds a run up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

STAGES = ("read", "decode", "text", "idle")
"""Waiting for bytes; decoding, cropping and resizing; captions and tokens; waiting for a free batch to write to."""
_IDLE = len(STAGES) - 1
NAMES = {"read": "reading", "decode": "decoding", "text": "tokenizing", "idle": "handing over"}
_FIXES = {
    "read": "raise data.read_ahead, or keep the shards on a local disk (data.cache_dir)",
    "decode": "raise data.workers or pack smaller images",
    "text": "raise data.workers",
    "idle": "raise data.prefetch",
}
_NO_WORKERS = "the training process does it itself: set data.workers"


@dataclass
class Work:
    """Seconds of a rank's workers by stage, over some rows."""

    read: float = 0.0
    decode: float = 0.0
    text: float = 0.0
    idle: float = 0.0
    samples: int = 0
    truncated: int = 0
    """Captions that did not fit the context length."""

    def add(self, other: Work) -> None:
        for name in (field.name for field in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def since(self, before: Work) -> Work:
        """What has come on top of an earlier state."""
        return Work(*(getattr(self, field.name) - getattr(before, field.name) for field in fields(self)))


class Stages:
    """Times the stages of one worker.

    Args:
        note: told (stage, place) at each change, for whoever wonders what a silent worker does.
    """

    def __init__(self, note: Callable[[int, int], None] | None = None) -> None:
        self._note, self._work, self._idle_since = note, Work(), time.perf_counter()

    @contextmanager
    def at(self, stage: str, place: int = -1) -> Iterator[None]:
        """Around work of a stage for the row at a place (-1: for many)."""
        if self._note is not None:
            self._note(STAGES.index(stage), place)
        begin = time.perf_counter()
        try:
            yield
        finally:
            setattr(self._work, stage, getattr(self._work, stage) + time.perf_counter() - begin)

    def resume(self) -> None:
        """A task has come: what passed since the last one was handed over is idle."""
        self._work.idle += time.perf_counter() - self._idle_since

    def take(self) -> Work:
        """The work since the last call. The worker is idle from here on."""
        work, self._work, self._idle_since = self._work, Work(), time.perf_counter()
        if self._note is not None:
            self._note(_IDLE, -1)
        return work


def diagnose(wait_share: float, seconds: Mapping[str, float], samples_per_s: float, workers: int) -> str:
    """One line: how long steps wait for data, which stage is the limit, and what to do.

    Args:
        wait_share: of the time of a step.
        seconds: of a rank's workers, by stage.
        samples_per_s: of a rank.
        workers: processes of a rank.
    """
    total = max(sum(seconds[stage] for stage in STAGES), 1e-9)
    # Workers that mostly wait for room are not slow; where they do work, the longest stage of the work is the limit.
    busy = [stage for stage in STAGES if stage != "idle"]
    limit = "idle" if seconds["idle"] > 0.5 * total else max(busy, key=lambda stage: seconds[stage])
    whose = "the workers'" if workers else "the loader's"
    who = f"{workers} worker{'s' * (workers != 1)}" if workers else "no workers"
    fix = _FIXES[limit] if workers else _NO_WORKERS
    share = f"{_percent(seconds[limit] / total)} of {whose} time, {who} at {samples_per_s:,.0f} samples/s"
    return f"data: steps wait {_percent(wait_share)} of the time for data; {NAMES[limit]} is the limit ({share}): {fix}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
