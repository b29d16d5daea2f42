"""One function over many tasks on all cores, by processes that end with their parent and whose end is noticed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from pretrain import signals
from pretrain.errors import ProcessDied, UserError

T = TypeVar("T")
R = TypeVar("R")
Tick = Callable[[int, int], None]
"""Called with samples and bytes done since the last call."""
_Work = Callable[[Any, Tick], Any]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def spread(work: Callable[[T, Tick], R], tasks: Iterable[T], workers: int, tick: Tick) -> Iterator[R]:
    """Results of all tasks, as they are done. With one worker, in this process.

    Args:
        work: travels to each process once, and is called there with one task after another.

    Raises:
        UserError, OSError: as the work raised it.
        RuntimeError: anything else that the work raised, with its traceback.
        ProcessDied: a worker was killed, or left.
    """
    if workers <= 1:
        yield from (work(task, tick) for task in tasks)
        return
    with contextlib.ExitStack() as closing:
        staff = _Staff(work, workers)
        closing.callback(staff.stop)
        yield from staff.run(tasks, tick)


class _Staff:
    def __init__(self, work: _Work, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
        self._work: _Work = work
        self._context = context
        self._limit = workers
        self._all: dict[Connection, SpawnProcess] = {}
        self._idle: list[Connection] = []

    def run(self, tasks: Iterable[Any], tick: Tick) -> Iterator[Any]:
        """Results as they come; a worker is started only when there is a task for it."""
        for task in tasks:
            while not self._idle and len(self._all) >= self._limit:
                yield from self._listen(tick)
            self._free().send(task)
        while len(self._idle) < len(self._all):
            yield from self._listen(tick)

    def stop(self) -> None:
        for conn, process in self._all.items():
            conn.close()
            process.kill()  # what is whole is on disk, and what is not is under another name
        for process in self._all.values():
            process.join()

    def _free(self) -> Connection:
        if self._idle:
            return self._idle.pop()
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        with signals.held():
            process.start()
        theirs.close()  # so that the end of the process is an end of file here
        self._all[ours] = process
        return ours

    def _listen(self, tick: Tick) -> Iterator[Any]:
        busy = [conn for conn in self._all if conn not in self._idle]
        for conn in connection.wait(busy):
            assert isinstance(conn, Connection)
            kind, content = self._receive(conn)
            if kind == "tick":
                tick(*content)
                continue
            if kind == "error":
                raise content
            self._idle.append(conn)
            yield content

    def _receive(self, conn: Connection) -> tuple[str, Any]:
        try:
            kind, content = conn.recv()
        except (EOFError, ConnectionResetError):
            process = self._all[conn]
            process.join()
            code = process.exitcode or 0
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            hint = ", perhaps for want of memory: try fewer workers" if code == -signal.SIGKILL else ""
            raise ProcessDied(f"a worker process ended {how}{hint}; the same command goes on where it was") from None
        return kind, content


def _serve(conn: Connection, work: _Work) -> None:
    """Answer tasks until the parent is gone."""
    signals.leave_to_parent()
    while True:
        try:
            task = conn.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = ("done", work(task, lambda samples, size: _tell(conn, ("tick", (samples, size)))))
        except (UserError, OSError) as error:
            answer = ("error", error)
        except Exception:
            answer = ("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
        _tell(conn, answer)


def _tell(conn: Connection, message: tuple[str, Any]) -> None:
    try:
        conn.send(message)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(1)  # nobody is there to be told why
