"""Forked processes that do numbered tasks, and what becomes of them when one fails, dies or is silent.

Each worker has a pipe of its own, so that one killed at any moment holds no lock that another needs, and its death is
the end of its pipe. A worker whose parent is gone meets the same end, and leaves nothing behind.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import signal
import struct
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from pretrain import signals
from pretrain.data.stages import NAMES, STAGES
from pretrain.errors import ProcessDied, UserError

log = logging.getLogger(__name__)

_NOTE = struct.Struct("qq")
_PARENT_CHECK_S = 5.0
PATIENCE_S = 480.0
"""Less than the ten minutes after which other ranks give up waiting for this one, which then tells why."""
_END_S = 2.0
"""Seconds that workers get to end by themselves."""

Task = Callable[[int], Any]
Note = Callable[[int, int], None]


class Job(Protocol):
    """What workers do."""

    def start(self, worker: int, workers: int, note: Note) -> Task:
        """Called once in a worker: what does task t there, for t = worker, worker + workers, ...

        What a task returns travels through a pipe: small, and no tensors.

        Args:
            note: tells the parent (stage, place) that the worker is at.
        """
        ...


@dataclass
class _Worker:
    number: int
    pid: int
    pipe: Connection[Any, Any]


class Workers:
    """`count` processes, forked here; task t is done by worker t % count.

    Args:
        rank: for messages.
        heartbeat_s: how often a wait for a silent worker is told in the log.
        patience_s: how long a worker that is waited for may be at the same place before it is ended.
    """

    def __init__(
        self, job: Job, count: int, rank: int, heartbeat_s: float = 60.0, patience_s: float = PATIENCE_S
    ) -> None:
        self._rank, self._heartbeat_s, self._patience_s = rank, heartbeat_s, patience_s
        self._board = mmap.mmap(-1, count * _NOTE.size)
        self._workers: list[_Worker] = []
        try:
            for number in range(count):
                self._workers.append(self._fork(job, number, count))
        except OSError as error:
            self.close()
            raise UserError(f"data.workers {count}: a process cannot be started ({error}); lower it") from error

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def allow(self, task: int) -> None:
        """Let a task begin; tasks of a worker are allowed, and their results taken, in order."""
        worker = self._of(task)
        try:
            worker.pipe.send(task)
        except OSError:
            raise self._died(worker) from None

    def result(self, task: int) -> Any:
        """What the task returned, waited for.

        Raises:
            UserError, OSError: the task raised it.
            RuntimeError: it raised anything else; the text holds the worker's traceback.
            ProcessDied: the worker was killed, left, or had to be killed because it did not get on.
        """
        worker, since = self._of(task), time.monotonic()
        place, arrived = self._place(worker), since
        try:
            while not worker.pipe.poll(min(self._heartbeat_s, self._patience_s)):
                before, place, now = place, self._place(worker), time.monotonic()
                arrived = arrived if place == before else now
                if now - arrived > self._patience_s:
                    raise self._stuck(worker, now - arrived)
                log.warning("%s", self._silence(worker, now - since))
            done, outcome = worker.pipe.recv()
        except (EOFError, OSError):
            raise self._died(worker) from None
        assert done == task, f"task {task} was asked for, {done} came"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """End the workers: asked first, then killed; on return there are none."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.pipe.close()
        until = time.monotonic() + _END_S
        for worker in workers:
            if _ended(worker.pid, until - time.monotonic()) is None:
                os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)

    def _fork(self, job: Job, number: int, count: int) -> _Worker:
        ours, theirs = Pipe()
        parent = os.getpid()
        with signals.held():
            pid = os.fork()
            if not pid:
                signals.leave_to_parent()
        if pid:
            theirs.close()
            return _Worker(number, pid, ours)
        code = 1
        try:
            # Only then does a worker's end close its pipe: no sibling may hold the other end.
            for pipe in (ours, *(worker.pipe for worker in self._workers)):
                pipe.close()
            _serve(job, number, count, theirs, parent, self._note(number))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # what the parent has left to do at its exit is not the child's to do

    def _note(self, number: int) -> Note:
        return lambda stage, place: _NOTE.pack_into(self._board, number * _NOTE.size, stage, place)

    def _of(self, task: int) -> _Worker:
        return self._workers[task % len(self._workers)]

    def _place(self, worker: _Worker) -> tuple[int, int]:
        """(stage, place) that a worker is at."""
        stage, place = _NOTE.unpack_from(self._board, worker.number * _NOTE.size)
        return stage, place

    def _doing(self, worker: _Worker) -> str:
        stage, place = self._place(worker)
        return f"{NAMES[STAGES[stage]]}, place {place} of the sample order" if place >= 0 else NAMES[STAGES[stage]]

    def _silence(self, worker: _Worker, seconds: float) -> str:
        return f"data: {seconds:.0f} s without a batch: {self._named(worker)} is at {self._doing(worker)}"

    def _stuck(self, worker: _Worker, seconds: float) -> ProcessDied:
        doing = self._doing(worker)
        os.kill(worker.pid, signal.SIGKILL)
        self._died(worker)
        return ProcessDied(
            f"data.workers: {self._named(worker)} was at {doing} for {seconds:.0f} s and was killed: a disk or server "
            "that does not answer, or a sample that no decoder gets through"
        )

    def _named(self, worker: _Worker) -> str:
        return f"worker {worker.number} of rank {self._rank} (pid {worker.pid})"

    def _died(self, worker: _Worker) -> ProcessDied:
        code = _ended(worker.pid, _END_S)
        self._workers = [other for other in self._workers if other is not worker]
        worker.pipe.close()
        return ProcessDied(f"data.workers: {self._named(worker)} {_how(code)}")


def _serve(job: Job, number: int, count: int, pipe: Connection[Any, Any], parent: int, note: Note) -> None:
    """Do tasks until the parent closes the pipe, or is gone."""
    torch.set_num_threads(1)
    done = queue.SimpleQueue[tuple[int, Any]]()
    # A thread sends: a full pipe must not keep a worker from its next task.
    threading.Thread(target=_send, args=(pipe, done), daemon=True).start()
    do = job.start(number, count, note)
    while True:
        try:
            while not pipe.poll(_PARENT_CHECK_S):
                if os.getppid() != parent:
                    return
            task = pipe.recv()
        except (EOFError, OSError):
            return
        done.put((task, _outcome(do, task)))


def _send(pipe: Connection[Any, Any], done: queue.SimpleQueue[tuple[int, Any]]) -> None:
    while True:
        try:
            pipe.send(done.get())
        except OSError:  # the parent has closed its end
            return
        except Exception:  # what cannot be sent would be waited for for ever
            traceback.print_exc()
            os._exit(1)


def _outcome(do: Task, task: int) -> Any:
    """What a task returns, or the error it raised, as a value that can be sent: a user's mistake stays one line."""
    try:
        return do(task)
    except UserError as error:
        return error
    except OSError as error:
        return OSError(str(error) or type(error).__name__)
    except Exception:
        return RuntimeError(f"a data worker failed:\n{traceback.format_exc()}")


def _ended(pid: int, timeout_s: float) -> int | None:
    """The exit code of a child (minus a signal's number), or None where it still runs after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def _how(code: int | None) -> str:
    """How a process ended, and what helps."""
    if code is None:
        return "closed its pipe and still runs; report this"
    if code >= 0:
        return f"left with exit code {code}: its own messages, above, say why"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return (
            f"was killed by signal 9 ({name}: mostly out of memory): give the job more memory or lower data.workers / "
            "data.prefetch"
        )
    return f"was killed by signal {-code} ({name}): a crash in a library that decodes or reads, or somebody's kill"
