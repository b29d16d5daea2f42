"""Threads that read samples before they are decoded, so that a decoder waits for no disk and no network."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from pretrain.data.shards.reader import RawSample

MAX_BYTES = 256 << 20
"""Encoded images held in all; past it, reading goes on when some were taken. The threads' current reads come on top."""
Read = tuple[int, int]
"""(place, sample number): a sample may stand at several places."""


class ReadAhead:
    """Samples by place, read in the order in which they were asked for, and handed out in any.

    What reading raises is raised by `take`, where the sample's turn comes. A place that no thread has begun is read by
    the taker itself, so threads never hold it up, and none at all is a plain read.

    Args:
        read: number -> sample; called by several threads at once.
        threads: how many; they end with `close`, or with the process.
    """

    def __init__(self, read: Callable[[int], RawSample], threads: int, max_bytes: int = MAX_BYTES) -> None:
        self._read, self._max_bytes = read, max_bytes
        self._plan = deque[Read]()
        self._reading: set[int] = set()
        self._ready: dict[int, RawSample | Exception] = {}
        self._held, self._open = 0, True
        lock = threading.Lock()
        self._more, self._came = threading.Condition(lock), threading.Condition(lock)
        for _ in range(threads):
            threading.Thread(target=self._work, name="read-ahead", daemon=True).start()

    def want(self, reads: Iterable[Read]) -> None:
        """Read these, after those asked for before."""
        with self._more:
            self._plan.extend(reads)
            self._more.notify_all()

    def take(self, place: int, number: int) -> RawSample:
        """The sample at a place, waited for where it is being read.

        Raises:
            BadSample, UserError, OSError: as `read` did, for this place.
        """
        outcome = self._taken(place, number)
        if outcome is None:
            return self._read(number)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """No further read begins."""
        with self._more:
            self._open = False
            self._plan.clear()
            self._more.notify_all()

    def _taken(self, place: int, number: int) -> RawSample | Exception | None:
        """What a thread has read, or None where none has begun, and now none will."""
        with self._came:
            if (place, number) in self._plan:
                self._plan.remove((place, number))
                return None
            while place in self._reading:
                self._came.wait()
            outcome = self._ready.pop(place, None)
            full = self._held >= self._max_bytes
            self._held -= _size(outcome)
            if full:
                self._more.notify_all()
            return outcome

    def _work(self) -> None:
        while (read := self._next()) is not None:
            place, number = read
            outcome: RawSample | Exception
            try:
                outcome = self._read(number)
            except Exception as error:  # whatever it is, it is raised where the place is taken
                outcome = error
            with self._came:
                self._reading.discard(place)
                self._ready[place] = outcome
                self._held += _size(outcome)
                self._came.notify_all()

    def _next(self) -> Read | None:
        with self._more:
            while self._open and not (self._plan and self._held < self._max_bytes):
                self._more.wait()
            if not self._open:
                return None
            read = self._plan.popleft()
            self._reading.add(read[0])
            return read


def _size(outcome: RawSample | Exception | None) -> int:
    return len(outcome.image_bytes) if isinstance(outcome, RawSample) else 0
