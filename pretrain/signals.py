"""Being asked to stop: a signal raises a flag, and the loop, when every rank knows, ends at a step's end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Whether SIGTERM or SIGINT has come. Asking twice is asking once; the old handlers return when the block ends,
    or, once asked, nothing is heard any more."""

    def __init__(self, signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self.received: str | None = None
        self._signals = signals
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._hear) for number in self._signals}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            # A second Ctrl-C must not break off what the first one ended in order.
            signal.signal(number, handler if self.received is None else signal.SIG_IGN)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
