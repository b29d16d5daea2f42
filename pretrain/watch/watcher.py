"""The threads that look after their rank: one writes its heartbeat, one ends the process when that stands still."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from pretrain import phases
from pretrain.config import Run
from pretrain.errors import FAILURE, RanksLost, exit_code
from pretrain.watch import beats, stall, traces
from pretrain.watch.signs import Signs
from pretrain.world import World, environment

PATIENT, PATIENCE = ("start", "data", "writing", "committing", "pruning", "evaluating"), 6
"""Phases whose length grows with the data, the disk or the model get PATIENCE times `train.timeout_s`; they never wait
for other ranks, and data has a patience of its own."""
BEAT_S, END_S = 2.0, 20.0
"""Seconds between heartbeats; seconds that a process gets to tell how it ends, though its disk may not answer."""


def watching(run: Run) -> Watch:
    """The watch of this rank of a run."""
    rank, size, _ = environment()
    return Watch(rank, size, run.train.timeout_s, run.path / beats.FOLDER / beats.TRACES)


@contextmanager
def watching_ranks(timeout_s: float) -> Iterator[Watch | None]:
    """The watch of this rank among others that train nothing; None where it is alone, for nobody waits for it."""
    rank, size, _ = environment()
    if size == 1:
        yield None
        return
    with Watch(rank, size, timeout_s) as watch:
        yield watch


class Runs(Protocol):
    """What is trained, as far as it is watched."""

    @property
    def step(self) -> int: ...


class Watch:
    """A context manager around everything that a rank does, its joining the others and leaving them included."""

    def __init__(self, rank: int, size: int, timeout_s: float, traces: Path | None = None) -> None:
        """
        Args:
            timeout_s: a phase that lasts half as long is reported, one that lasts so long ends the process.
            traces: where the flight recorder's dumps go; None: beside the heartbeats.
        """
        self.traces = traces
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._signs = Signs()
        self._runs: Runs | None = None
        self._run_folder: Path | None = None
        self._told = self._failed = False
        self._beat_s = min(BEAT_S, timeout_s / 10)
        self._lock, self._done = threading.Lock(), threading.Event()
        self._listening = phases.listening(self._signs)

    def open(self, run_folder: Path, world: World) -> None:
        """From here on heartbeats are written; the run folder must be this run's. Collective."""
        with world.together(f"opening {run_folder / beats.FOLDER}"):
            if world.is_main:
                beats.open_folder(run_folder)
        self._run_folder = run_folder
        self._write()

    def follow(self, runs: Runs) -> None:
        """Whose steps are told from here on."""
        self._runs = runs

    def end(self, code: int, reason: str | None) -> None:
        """Leave the exit record; no heartbeat comes after it."""
        self._done.set()
        self._write(code, reason)

    def __enter__(self) -> Watch:
        self._listening.__enter__()
        loops = (self._judge, self._beat_on)
        self._threads = [threading.Thread(target=loop, daemon=True, name=loop.__name__.strip("_")) for loop in loops]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bound = _end_after(END_S, exit_code(error), f"rank {self._rank} did not end, after {_line(error)}")
        if isinstance(error, RanksLost):
            self._report(ending=True)
        self.end(exit_code(error), _line(error) if error else None)
        for thread in self._threads:
            thread.join(END_S)
        self._listening.__exit__(None, None, None)
        if not isinstance(error, RanksLost):  # then threads of libraries may wait for the others for ever
            bound.cancel()

    def _judge(self) -> None:
        """End the process when it stands still; a thread that touches no disk before that is decided."""
        last = time.monotonic()
        while not self._done.wait(self._beat_s):
            now = time.monotonic()
            if now - last > 5 * self._beat_s:  # the process was suspended, and so were the others, perhaps
                self._signs.forgive(now - last)
            last = now
            still_s, at = self._signs.still_s(), self._signs.at
            if still_s > self._timeout_s * (PATIENCE if at.name in PATIENT else 1):
                _end_after(END_S, FAILURE, f"rank {self._rank} stands still in phase {at}, and so do its reports")
                self._report(ending=True)
                self.end(FAILURE, f"in phase {at} for {still_s:.0f} s: ended")
                os._exit(FAILURE)

    def _beat_on(self) -> None:
        """Write heartbeats, and tell of a stall; a thread that may wait for the disk for ever."""
        while not self._done.wait(self._beat_s):
            self._write()
            if self._signs.still_s() <= self._timeout_s / 2:
                self._told = False
            elif not self._told:
                self._told = True
                self._report(ending=False)

    def _report(self, ending: bool) -> None:
        """Tell who keeps whom waiting: one rank for all, and each that is waited for for itself."""
        what = "is ended" if ending else "stands still"
        still = f"{self._signs.at} for {self._signs.still_s():.0f} s"
        if self._run_folder is None:
            _say(f"rank {self._rank} {what}: in phase {still}, before the run folder was opened")
            return
        folder = self._run_folder / beats.FOLDER
        with self._disk():
            found = stall.find(beats.read(folder), self._size, beats.stamp())
            with beats.stack_path(folder, self._rank).open("w") as file:
                faulthandler.dump_traceback(file)
            traces.write(self.traces or folder / beats.TRACES, self._rank, self._size)
            if found.writer == self._rank or (found.writer is None and self._rank == 0):
                _say(f"the run {what}: {'; '.join(found.lines)} (pretrain ranks {self._run_folder})")
                fact = {"time": beats.stamp(), "told_by": self._rank, "ending": ending, "behind": found.behind}
                with (self._run_folder / "stalls.jsonl").open("a") as file:
                    file.write(json.dumps(fact | {"lines": found.lines}) + "\n")
            elif self._rank in found.behind:
                _say(f"rank {self._rank} {what}: in phase {still}; its stack is in {folder}")

    def _write(self, code: int | None = None, reason: str | None = None) -> None:
        if self._run_folder is None:
            return
        with self._lock, self._disk():
            if code is None and self._done.is_set():
                return
            beats.write(self._run_folder / beats.FOLDER, self._beat(code, reason))

    def _beat(self, code: int | None, reason: str | None) -> beats.Beat:
        at, background = self._signs.at, self._signs.background
        return beats.Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            attempt=beats.attempt(),
            step=self._runs.step if self._runs is not None else 0,
            phase=at.name,
            detail=at.detail,
            since=beats.stamp(self._signs.still_s()),
            time=beats.stamp(),
            calls=self._signs.calls,
            call=self._signs.call,
            entered=self._signs.entered,
            background=None if background is None else str(background),
            code=code,
            reason=reason,
        )

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """A heartbeat is worth no run: what the disk refuses is told once."""
        try:
            yield
        except (OSError, ValueError) as error:
            if not self._failed:
                self._failed = True
                _say(f"rank {self._rank}: heartbeats cannot be kept: {error}")


def _end_after(seconds: float, code: int, why: str) -> threading.Timer:
    """End this process with `code`, whatever it then waits for, unless the timer is cancelled."""

    def end() -> None:
        _say(f"{why}: ended after {seconds:g} s more")
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _say(line: str) -> None:
    """On every rank: the first may be the one that cannot speak."""
    print(f"pretrain: {line}", file=sys.stderr, flush=True)


def _line(error: BaseException | None) -> str:
    if error is None:
        return "it was done"
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
