"""The starts of a run, why each but the last one ended, and how many steps had to be done again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain.history import endings, lines
from pretrain.history.lines import Record

UNKNOWN = "ended without a word"


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    time: str
    """UTC, ISO 8601."""
    step: int
    """Optimizer steps that lay behind it."""
    reason: str | None
    """Why the start before had ended; None for the first."""
    lost_steps: int | None
    """Steps that the start before had done beyond `step`; None: nobody wrote that down."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of its event: ranks, engine, exchange, total_samples, ..."""


@dataclass(frozen=True)
class Events:
    """events.jsonl in short."""

    starts: tuple[Start, ...]
    saved: Record | None
    """The last checkpoint that was entered, and not dropped by going back."""
    steps_skipped: tuple[Record, ...]
    """Steps that the guard left out: time, step, reason."""
    rewinds: tuple[Record, ...]
    """Times that the run went back: time, step, to."""
    weights_differ: tuple[Record, ...]
    last: str | None
    """Time of the newest event."""


def read(run: Path) -> Events:
    """What has happened to the run in a folder."""
    story = _Story()
    for event in lines.objects(lines.whole(run / "events.jsonl")):
        story.take(event)
    told = story.starts
    if len(told) > 1 and told[-1].reason == UNKNOWN and (found := endings.before(run)):
        told[-1] = _ended(told[-1], found["step"], found["reason"])
    return Events(
        starts=tuple(told),
        saved=story.saved,
        steps_skipped=tuple(story.skipped),
        rewinds=tuple(story.rewinds),
        weights_differ=tuple(story.differ),
        last=story.last,
    )


def seconds_between(earlier: str, later: str) -> float:
    """From one moment to another, both UTC in ISO 8601."""
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


class _Story:
    """Takes events in the order in which they were written."""

    def __init__(self) -> None:
        self.starts: list[Start] = []
        self.skipped: list[Record] = []
        self.rewinds: list[Record] = []
        self.differ: list[Record] = []
        self.saved: Record | None = None
        self.last: str | None = None
        self._before: Record = {}

    def take(self, event: Record) -> None:
        kind = event.get("event")
        if not isinstance(event.get("time"), str) or not isinstance(event.get("step"), int):
            return
        self.last = max(self.last or "", event["time"])
        if kind == "start":
            self._start(event)
        elif kind == "saved":
            self.saved = event
        elif kind == "step_skipped":
            self.skipped.append({key: event.get(key) for key in ("time", "step", "reason")})
        elif kind == "rewound":
            self.rewinds.append({key: event.get(key) for key in ("time", "step", "to")})
            self.saved = None if self.saved and self.saved["step"] > event.get("to", 0) else self.saved
        elif kind == "weights_differ":
            self.differ.append({key: event.get(key) for key in ("time", "step", "parameter", "ranks")})
        self._before = event

    def _start(self, event: Record) -> None:
        went_back = self._before.get("event") == "rewound"
        if self.starts and went_back and event.get("pids") == self.starts[-1].facts.get("pids"):
            return  # the same processes go on from an earlier step
        facts = {key: value for key, value in event.items() if key not in ("time", "event", "step", "before")}
        start = Start(event["time"], event["step"], None, None, facts)
        self.starts.append(self._after_another(start, event.get("before")) if self.starts else start)

    def _after_another(self, start: Start, before: Any) -> Start:
        if self._before.get("event") == "stopped":
            return _ended(start, self._before["step"], f"stopped by {self._before.get('signal') or 'a signal'}")
        if isinstance(before, dict) and before.get("reason"):
            return _ended(start, before.get("step"), str(before["reason"]))
        return replace(start, reason=UNKNOWN)


def _ended(start: Start, reached: Any, reason: str) -> Start:
    lost = max(0, reached - start.step) if isinstance(reached, int) else None
    return replace(start, reason=reason, lost_steps=lost)
