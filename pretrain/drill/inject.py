"""The fault inside its victim: a listener to phases that does what PRETRAIN_FAULT says, once it is time.

Nothing here is imported unless the variable is set.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from pretrain.drill.acts import ACTS
from pretrain.drill.spec import Spec, parse
from pretrain.phases import listening

HAPPENS = "fault happens:"
"""What a victim writes to standard error at the moment of the fault; whoever set the variable looks for it."""


@contextmanager
def armed(text: str) -> Iterator[None]:
    """Let the faults of a text happen inside the block.

    Raises:
        UserError: the text is not understood.
    """
    rank = int(os.environ.get("RANK", "0"))
    specs = [spec for spec in parse(text, ACTS) if spec.rank in (None, rank)]
    with listening(*(Fault(spec) for spec in specs)):  # first in line: what it breaks off no other listener has entered
        yield


class Fault:
    """One spec, waiting for its moment; in this process, not in those that it forks."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._pid = spec, os.getpid()
        self._step = self._met = self._done = 0
        self._lock = threading.Lock()
        self._inside = threading.local()

    def enter(self, name: str, detail: str) -> None:
        self._step += name == "data"
        fits = name == self._spec.phase and fnmatchcase(detail, self._spec.detail)
        self._stack().append(fits)
        if fits and self._spec.edge == "enter":
            self._meet(detail)

    def leave(self, name: str) -> None:
        if self._stack().pop() and self._spec.edge == "leave":
            self._meet("")

    def _stack(self) -> list[bool]:
        """Whether the phases that this thread is in are meant."""
        if not hasattr(self._inside, "stack"):
            self._inside.stack = []
        stack: list[bool] = self._inside.stack
        return stack

    def _meet(self, detail: str) -> None:
        with self._lock:
            spec, early = self._spec, self._step < self._spec.step
            self._met += not early
            over = spec.times and self._done >= spec.times
            if early or self._met < spec.nth or over or os.getpid() != self._pid:
                return
            self._done += 1
        if self._done == 1:
            os.write(2, f"{HAPPENS} {spec.act}@{spec.phase} {spec.edge} {detail}\n".encode())
        ACTS[spec.act](spec)
