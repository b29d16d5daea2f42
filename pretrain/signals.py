"""Being asked to stop. A signal raises a flag, and the loop, when every rank knows, saves and ends at a step's end.

Before there is anything to save, and while the loop only waits for data, it need not wait for that: code inside
`interruptible()` is left at once, and what is stuck where no Python runs is ended after `GRACE_S`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pretrain.errors import REQUEUE, Stopped

MAY_STOP = ("USR1", "USR2", "HUP", "QUIT", "XCPU", "TERM", "INT")
"""What `train.stop_signal` may be: what schedulers and people send, and what may be caught."""
GRACE_S = 10.0
"""Seconds that a start gets to end by itself once a signal came; schedulers kill after 20 to 60."""
_JOIN_S = 1.0
"""A child process that is being killed may hold the pipe's other end for a moment."""
_ALWAYS = (signal.SIGTERM, signal.SIGINT)
_REMEMBERED = (*_ALWAYS, signal.SIGUSR1, signal.SIGUSR2)
_heard = set[int](_REMEMBERED)
"""What a process of this program must not die of."""


class StopRequest:
    """Whether a signal has asked to stop. Asking often is asking once; the old handlers return when the block ends, or,
    once asked, nothing is heard any more.

    Until `choose` every signal that may be meant is remembered, because the config that says which is not read yet.
    """

    active: StopRequest | None = None

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal that came."""
        self.nothing_to_lose = True
        """Whether the process may be ended without saving; the loop says when that is over."""
        self.before_leaving: Callable[[int, str], None] = lambda code, reason: None
        """Told the exit code and the reason where the process is ended from outside its main thread."""
        self._chosen: str | None = None
        self._raises, self._told = False, set[int]()
        self._before: dict[int, Any] = {}
        self._ended = threading.Event()

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def choose(self, name: str) -> None:
        """Which signal stops beside TERM and INT; one that came before and is not meant is told and forgotten."""
        number = _number(name)
        _heard.add(number)
        if number not in self._before:
            self._before[number] = signal.signal(number, self._hear)
        self._chosen = signal.Signals(number).name
        if self.received is not None and not self._meant(signal.Signals[self.received]):
            unmeant, self.received = signal.Signals[self.received], None
            self._tell_once(unmeant)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises Stopped, once; one that came before does so at once."""
        if self.received is not None:
            raise self._stopped()
        before, self._raises = self._raises, True
        try:
            yield
        finally:
            self._raises = before and self.received is None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._hear) for number in _REMEMBERED}
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python runs a handler only between two instructions of the main thread: a thread hears it without that.
        self._wakeup = (signal.set_wakeup_fd(writer, warn_on_full_buffer=False), writer)
        self._thread = threading.Thread(target=self._bound, args=(reader,), daemon=True, name="stop")
        self._thread.start()
        StopRequest.active = self
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        StopRequest.active = None
        for number, handler in self._before.items():
            # A second Ctrl-C must not break off what the first one ended in order.
            signal.signal(number, handler if self.received is None else signal.SIG_IGN)
        before, writer = self._wakeup
        signal.set_wakeup_fd(before)
        os.close(writer)
        self._thread.join(_JOIN_S)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._meant(number):
            self._tell_once(number)
            return
        self.received = self.received or signal.Signals(number).name
        if self._raises:
            self._raises = False
            raise self._stopped()

    def _meant(self, number: int) -> bool:
        return self._chosen is None or number in _ALWAYS or signal.Signals(number).name == self._chosen

    def _meant_of(self, numbers: bytes) -> list[str]:
        return [signal.Signals(number).name for number in numbers if number in _heard and self._meant(number)]

    def _stopped(self) -> Stopped:
        return Stopped(f"{self.received} came: there was nothing to save, start again")

    def _tell_once(self, number: int) -> None:
        if number not in self._told:
            self._told.add(number)
            name = signal.Signals(number).name
            _say(f"{name} came and changes nothing: train.stop_signal is {self._chosen}")

    def _bound(self, reader: int) -> None:
        """End the process where a start does not end by itself; a thread."""
        while numbers := os.read(reader, 64):
            if not self._meant_of(numbers) or self._ended.wait(GRACE_S) or not self.nothing_to_lose:
                continue
            if meant := self._meant_of(numbers):  # the config may have been read meanwhile, and mean another signal
                reason = f"{meant[0]} came, and the start did not end within {GRACE_S:g} s"
                _say(f"{reason}: ended; there was nothing to save, start again")
                self.before_leaving(REQUEUE, reason)
                os._exit(REQUEUE)
        os.close(reader)


@contextmanager
def armed() -> Iterator[StopRequest]:
    """The StopRequest of this process: the one that is active, or a new one."""
    if StopRequest.active is not None:
        yield StopRequest.active
        return
    with StopRequest() as stop:
        yield stop


@contextmanager
def interruptible(when: bool = True) -> Iterator[None]:
    """Around code that a stopping signal may leave at any point, with Stopped, because nothing is lost by that.

    There may be no collective inside, unless this rank is alone: other ranks would wait in it. Nobody need have armed
    a StopRequest; then this changes nothing.

    Args:
        when: False changes nothing either.
    """
    if StopRequest.active is None or not when:
        yield
        return
    with StopRequest.active.raising():
        yield


@contextmanager
def held() -> Iterator[None]:
    """Around the start of a child process: what signals come for it wait until it has called `leave_to_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _heard)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent() -> None:
    """In a child process: schedulers signal every process of a job, and the parent ends its children itself."""
    waiting = {*_heard, *signal.pthread_sigmask(signal.SIG_BLOCK, ())} - {signal.SIGCHLD}
    for number in waiting:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, waiting)


def problems(name: str) -> list[str]:
    """Why `train.stop_signal` may not be this; it may be a name with or without SIG."""
    if name.removeprefix("SIG") in MAY_STOP:
        return []
    return [f"train.stop_signal {name} must be one of {', '.join(MAY_STOP)}: others mean a fault, or end a process"]


def _number(name: str) -> int:
    return signal.Signals[f"SIG{name.removeprefix('SIG')}"]


def _say(line: str) -> None:
    """On stderr, past its buffer: a handler may have interrupted somebody who was writing there."""
    os.write(2, f"pretrain: {line}\n".encode())
