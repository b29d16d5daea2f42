"""Signs of life of this rank: the phases it enters, and the collectives among them, counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

COLLECTIVE = ("agreeing", "exchange")
"""Phases in which a rank waits for the others; all ranks enter the same ones in the same order."""
STARTING = "start"


@dataclass(frozen=True)
class Place:
    """A phase that a thread is in."""

    name: str
    detail: str
    since: float
    """On the clock of the `Signs`."""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


NOWHERE = Place("between phases", "", 0.0)


class Signs:
    """A listener of phases. The thread that makes it is the main one, whose phases count as the rank's.

    Attributes:
        calls: collectives entered so far, the same on all ranks that are at the same point.
        call: the last of them.
        entered: phases entered since the last collective.
        changed: when something happened last, on `now`'s clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._main = now, threading.get_ident()
        self._stack: list[Place] = []
        self._others: dict[int, list[Place]] = {}
        self.calls, self.call, self.entered, self.changed = 0, "", 0, now()

    def enter(self, name: str, detail: str) -> None:
        me, now = threading.get_ident(), self._now()
        main = me == self._main
        (self._stack if main else self._others.setdefault(me, [])).append(Place(name, detail, now))
        # Autograd waits for exchanges in threads of its own; a checkpoint's writer has collectives that nobody counts.
        if name == "exchange" or (main and name in COLLECTIVE):
            self.calls, self.call, self.entered, self.changed = self.calls + 1, f"{detail} of {name}", 0, now
        elif main:
            self.entered, self.changed = self.entered + 1, now
        elif self.at.name == STARTING:  # threads that index shards, say, are what a start waits for
            self.changed = now

    def leave(self, name: str) -> None:
        me, now = threading.get_ident(), self._now()
        stack = self._stack if me == self._main else self._others[me]
        stack.pop()
        if me == self._main or self.at.name == STARTING:
            self.changed = now
        if me != self._main and not stack:
            del self._others[me]

    def forgive(self, seconds: float) -> None:
        """Time in which the whole process stood still, because somebody had suspended it, does not count."""
        self.changed += seconds

    @property
    def at(self) -> Place:
        """The innermost phase of the main thread, since the last sign."""
        place = self._stack[-1:] or [NOWHERE]
        return replace(place[0], since=self.changed)

    @property
    def background(self) -> Place | None:
        """What another thread is at, mostly writing a checkpoint; None: nothing."""
        return next((stack[-1] for stack in list(self._others.values()) if stack), None)

    def still_s(self) -> float:
        """Seconds since the last sign."""
        return self._now() - self.changed
