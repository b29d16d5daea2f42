"""Forked workers: results in order, errors as they were, and what is said of one that is killed, left or is silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.workers import Note, Task, Workers
from pretrain.errors import ProcessDied, UserError

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """Does with a task what it is told, after saying where it is."""

    def __init__(self, do: Callable[[int], Any]) -> None:
        self.do = do

    def start(self, worker: int, workers: int, note: Note) -> Task:
        def task(number: int) -> Any:
            assert number % workers == worker
            note(1, 100 + number)
            return self.do(number)

        return task


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.005)


def results(do: Callable[[int], Any], tasks: int = 1, count: int = 1, **options: Any) -> list[Any]:
    workers = Workers(Job(do), count, rank=3, **options)
    try:
        for task in range(tasks):
            workers.allow(task)
        return [workers.result(task) for task in range(tasks)]
    finally:
        pids = workers.pids
        workers.close()
        assert all(map(gone, pids))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order_from_processes_of_their_own(count: int) -> None:
    found = results(lambda task: (task, os.getpid()), tasks=10, count=count)
    assert [task for task, _ in found] == list(range(10))
    assert len({pid for _, pid in found} - {os.getpid()}) == count


def test_results_larger_than_a_pipe_keep_no_worker_from_its_next_task(tmp_path: Path) -> None:
    def do(task: int) -> bytes:
        (tmp_path / str(task)).touch()
        return bytes([task]) * (1 << 20)

    workers = Workers(Job(do), 1, rank=0)
    for task in range(4):
        workers.allow(task)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 4)
    assert [workers.result(task)[-1] for task in range(4)] == [0, 1, 2, 3]
    workers.close()


def test_a_users_mistake_is_one_line_and_a_defect_keeps_its_traceback() -> None:
    def mistake(task: int) -> None:
        raise UserError("data.train: a.tar is gone")

    def disk(task: int) -> None:
        raise OSError(5, "Input/output error", "a.tar")

    def defect(task: int) -> None:
        raise KeyError("nobody foresaw it")

    with pytest.raises(UserError, match=r"^data\.train: a\.tar is gone$"):
        results(mistake)
    with pytest.raises(OSError, match=r"Input/output error.*a\.tar"):
        results(disk)
    with pytest.raises(RuntimeError, match=r"(?s)a data worker failed.*in defect.*nobody foresaw it"):
        results(defect)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda task: os.kill(os.getpid(), signal.SIGKILL), r"was killed by signal 9 \(SIGKILL: mostly out of me"),
        (lambda task: os.kill(os.getpid(), signal.SIGHUP), r"was killed by signal 1 \(SIGHUP\)"),
        (lambda task: os._exit(7), r"left with exit code 7"),
        (lambda task: lambda: task, r"left with exit code 1"),
        (lambda task: sys.exit(0), r"left with exit code 1"),
    ],
)  # fmt: skip
def test_a_worker_that_ends_is_an_error_with_its_exit_reason(do: Callable[[int], Any], said: str) -> None:
    with pytest.raises(ProcessDied, match=rf"^data\.workers: worker 0 of rank 3 \(pid \d+\) {said}") as caught:
        results(do)
    assert "\n" not in str(caught.value)


def test_a_silent_worker_is_told_of_with_what_it_is_at(caplog: pytest.LogCaptureFixture) -> None:
    assert results(lambda task: time.sleep(0.5) or task, heartbeat_s=0.1) == [0]
    assert len(caplog.messages) >= 2
    assert "worker 0 of rank 3 (pid " in caplog.messages[1]
    assert "is at decoding, place 100 of the sample order" in caplog.messages[1]


def test_a_worker_that_hangs_does_not_outlive_its_loader() -> None:
    workers = Workers(Job(lambda task: time.sleep(600)), 2, rank=0)
    workers.allow(0)
    pids = workers.pids
    workers.close()
    assert all(map(gone, pids))


ORPHANS = """
import os, sys, time
from pretrain.data.workers import Workers
class Job:
    def start(self, worker, workers, note):
        return lambda task: task
workers = Workers(Job(), 3, rank=0)
for task in range(3):
    workers.allow(task)
print(*workers.pids, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_of_a_killed_trainer_end_by_themselves() -> None:
    trainer = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) == 3
    trainer.kill()
    trainer.wait()
    wait_until(lambda: all(map(gone, pids)))


def test_a_worker_that_does_not_get_on_is_ended_and_named(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ProcessDied,
        match=r"^data\.workers: worker 0 of rank 3 \(pid \d+\) was at decoding, place 100 of .* was killed: a",
    ):
        results(lambda task: time.sleep(600), heartbeat_s=0.1, patience_s=0.5)
    assert "s without a batch" in caplog.text


def test_a_worker_that_gets_on_slowly_is_waited_for() -> None:
    class Slow:
        def start(self, worker: int, workers: int, note: Note) -> Task:
            def task(number: int) -> int:
                for place in range(12):
                    note(1, place)
                    time.sleep(0.1)
                return number

            return task

    workers = Workers(Slow(), 1, rank=0, heartbeat_s=0.05, patience_s=0.6)
    workers.allow(0)
    assert workers.result(0) == 0
    workers.close()
