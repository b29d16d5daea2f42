"""What a run remembers of its troubles: steps left out, how often it went back, and the samples it no longer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.data import left_out
from pretrain.data.left_out import Stretch
from pretrain.guard.judge import WINDOW

LOOK = 32
"""Steps from one decision whether to go back to the next, whatever is logged: logging changes no result."""


@dataclass(frozen=True)
class Trouble:
    """Steps were left out so often that the run goes back."""

    step: int
    """Where that was seen."""
    steps: tuple[int, ...]
    """Those that were left out, among the last WINDOW."""

    def stretch(self, batch: int, left: tuple[Stretch, ...]) -> Stretch:
        """Positions in the data order from the first offending batch to the last.

        Args:
            batch: pairs of a global batch.
            left: stretches that are left out already.
        """
        first, last = (left_out.position((step - 1) * batch, left) for step in (self.steps[0], self.steps[-1]))
        return first, last + batch


class Record:
    """Goes into checkpoints as JSON."""

    def __init__(self) -> None:
        self.skipped = 0
        """Steps left out since the run began."""
        self.recent: tuple[int, ...] = ()
        """Those among the last WINDOW."""
        self.rewinds = 0
        """Times the run went back."""
        self.left_out: tuple[Stretch, ...] = ()
        """Samples that the run no longer takes."""

    @property
    def first(self) -> int | None:
        """The earliest of them: a run that goes back needs a checkpoint before it."""
        return self.recent[0] if self.recent else None

    def add(self, step: int, skipped: list[int]) -> None:
        """Steps up to `step` are known; some of them were left out."""
        self.skipped += len(skipped)
        self.recent = tuple(old for old in (*self.recent, *skipped) if old > step - WINDOW)

    def trouble(self, step: int, patience: int, done: bool) -> Trouble | None:
        """Whether the run must go back, seen every LOOK steps and at the end."""
        if len(self.recent) < patience or (step % LOOK and not done):
            return None
        return Trouble(step, self.recent)

    def facts(self) -> dict[str, Any]:
        """As JSON, for `load`."""
        stretches = [list(stretch) for stretch in self.left_out]
        return {
            "skipped": self.skipped,
            "recent": list(self.recent),
            "rewinds": self.rewinds,
            "left_out": stretches,
        }

    def load(self, facts: Mapping[str, Any]) -> None:
        """Take back what `facts` gave."""
        self.skipped, self.recent = facts["skipped"], tuple(facts["recent"])
        self.went(facts)

    def went(self, facts: Mapping[str, Any]) -> None:
        """Take `rewinds` and `left_out` alone: the way of a run that has gone back since its checkpoint."""
        self.rewinds, self.left_out = facts["rewinds"], tuple((start, stop) for start, stop in facts["left_out"])
