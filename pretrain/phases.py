"""What this rank is doing, by name: timings, heartbeats, profiles and fault drills all listen here.

Phases nest: what happens in an inner one is not the outer one's. Threads that write in the background enter theirs too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

NAMES = (
    *("start", "data", "text_tower", "image_tower", "loss", "exchange", "backward", "optimizer", "logging", "agreeing"),
    *("staging", "writing", "committing", "pruning", "evaluating"),
)
"""committing: COMMIT is written and the checkpoint gets its name; agreeing: ranks tell each other how they are."""


class Listener(Protocol):
    """Told of every phase, in the thread that enters it. It must not raise, unless failing is its purpose."""

    def enter(self, name: str, detail: str) -> None: ...

    def leave(self, name: str) -> None: ...


_LISTENERS: list[Listener] = []


@contextmanager
def phase(name: str, detail: str = "") -> Iterator[None]:
    """Around what belongs to a phase.

    Args:
        name: one of NAMES.
        detail: what exactly, for reports: a collective, a file.
    """
    heard = tuple(_LISTENERS)
    for listener in heard:
        listener.enter(name, detail)
    try:
        yield
    finally:
        for listener in reversed(heard):
            listener.leave(name)


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """Let listeners hear every phase inside the block, after those that hear already."""
    _LISTENERS.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            _LISTENERS.remove(listener)
