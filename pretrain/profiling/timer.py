"""Seconds of every phase of a step: wall clock on a CPU, the device's own clock on a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import torch

STEP = ("data", "text_tower", "image_tower", "loss", "exchange", "backward", "optimizer")
"""Phases that are told of, in order; what no phase or another one takes is `other`."""
OUTSIDE = ("start", "staging", "writing", "committing", "pruning", "evaluating")
"""What is no part of a step, with everything inside it."""

Mark = TypeVar("Mark")


class Marks(Protocol[Mark]):
    """A clock whose readings may be known only later."""

    def now(self) -> Mark:
        """A reading; cheap, and it waits for nothing."""
        ...

    def settle(self, last: Mark) -> None:
        """Wait until every reading up to this one is known."""
        ...

    def seconds(self, first: Mark, last: Mark) -> float:
        """Between two readings that are known."""
        ...

    def forget(self, marks: list[Mark]) -> None:
        """Readings that nobody will ask for again."""
        ...


class WallMarks:
    """Seconds of the host."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def now(self) -> float:
        return self._now()

    def settle(self, last: float) -> None:
        return

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def forget(self, marks: list[float]) -> None:
        return


class DeviceMarks:
    """Events on the stream that is current where they are recorded; the host waits for none before `settle`."""

    def __init__(self, make: Callable[[], Any] | None = None) -> None:
        """
        Args:
            make: an event that can be timed; default: CUDA's.
        """
        self._make: Callable[[], Any] = make or partial(torch.cuda.Event, enable_timing=True)
        self._free: list[Any] = []

    def now(self) -> Any:
        event = self._free.pop() if self._free else self._make()
        event.record()
        return event

    def settle(self, last: Any) -> None:
        last.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        elapsed_ms: float = first.elapsed_time(last)
        return elapsed_ms / 1e3

    def forget(self, marks: list[Any]) -> None:
        self._free += marks


class Timer(Generic[Mark]):
    """Listens to phases. Time belongs to the phase that was entered last and not left yet: an inner one's is its own.

    Backward passes may run in autograd's threads: a step's phase counts whichever thread enters it, and the order in
    which threads leave theirs does not matter. Of other phases only those of the thread that made the timer count, so
    that files being written in the background take nothing from a step.
    """

    def __init__(self, marks: Marks[Mark]) -> None:
        self._marks, self._owner, self._lock = marks, threading.get_ident(), threading.Lock()
        self._open: list[tuple[int, str]] = []
        self._turns: list[tuple[Mark, str | None]] = [(marks.now(), None)]

    def enter(self, name: str, detail: str) -> None:
        thread = threading.get_ident()
        if name in STEP or thread == self._owner:
            with self._lock:
                self._open.append((thread, name))
                self._turn()

    def leave(self, name: str) -> None:
        mine = (threading.get_ident(), name)
        with self._lock:
            # One that was entered before anybody listened is not there.
            place = next((n for n in reversed(range(len(self._open))) if self._open[n] == mine), None)
            if place is not None:
                del self._open[place]
                self._turn()

    def take(self) -> dict[str, float]:
        """Seconds of every name of STEP since the last call, or since the timer was made. It waits for the device."""
        with self._lock:
            self._turn()
            turns, self._turns = self._turns, self._turns[-1:]
        self._marks.settle(turns[-1][0])
        found = dict.fromkeys(STEP, 0.0)
        for (first, name), (last, _) in pairwise(turns):
            if name is not None:
                found[name] += self._marks.seconds(first, last)
        self._marks.forget([mark for mark, _ in turns[:-1]])
        return found

    def _turn(self) -> None:
        """From now on time belongs to what is innermost now."""
        names = [name for _, name in self._open]
        counts = bool(names) and names[-1] in STEP and not any(name in OUTSIDE for name in names)
        self._turns.append((self._marks.now(), names[-1] if counts else None))


def timer(device: torch.device) -> Timer[Any]:
    """The timer of a rank that computes on `device`."""
    return Timer(DeviceMarks()) if device.type == "cuda" else Timer(WallMarks())
