"""What happened at a place of the curves: starts again, steps left out, stretches that were gone back over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pretrain.history.starts import UNKNOWN
from pretrain.history.status import Status

T = TypeVar("T")
Kind = Literal["restart", "skipped", "rewind"]
SIGNS: dict[Kind, tuple[str, str]] = {
    "restart": ("▲", "started again"),
    "skipped": ("◆", "step left out"),
    "rewind": ("◄", "gone back, the stretch left out"),
}
MOST = 60
"""Of a kind; of more, some that are equally far apart are drawn, and the table of events tells how many there were."""


@dataclass(frozen=True)
class Mark:
    """A place on the axis of samples."""

    kind: Kind
    samples: int
    until: int
    """`samples` itself, or the end of a stretch."""
    words: str


def of(status: Status, batch: int) -> list[Mark]:
    """Everything in a run's events that has a place on the curves.

    Args:
        batch: samples of a step.
    """
    events = status.events
    found = [_restart(start.step * batch, start.reason, start.lost_steps) for start in _some(events.starts[1:])]
    for skip in _some(events.steps_skipped):
        at = int(skip["step"]) * batch
        found.append(Mark("skipped", at, at, f"step {skip['step']:,} left out: {skip.get('reason')}"))
    for back in _some(events.rewinds):
        start, stop = int(back.get("to") or 0), int(back["step"])
        found.append(Mark("rewind", start * batch, stop * batch, f"gone back from step {stop:,} to {start:,}"))
    return found


def _restart(samples: int, reason: str | None, lost: int | None) -> Mark:
    again = f"; {lost:,} steps done again" if lost else ""
    return Mark("restart", samples, samples, f"started again at {samples:,} samples: {reason or UNKNOWN}{again}")


def _some(items: Sequence[T]) -> Sequence[T]:
    return items[:: max(1, -(-len(items) // MOST))]
