"""Two ranks as a scheduler starts them, one of which stands still: both end, and the report names it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pretrain import cli, errors

pytestmark = pytest.mark.slow
TIMEOUT_S, LATER_S = 12.0, 40.0
"""Of a collective; what a loaded machine may need beyond it."""


@contextmanager
def two_ranks(program: Any, folder: Path, *flags: object) -> Iterator[list[Any]]:
    """Without a launcher that would end one rank because the other has ended."""
    knobs = ("--log.every-steps", 1, "--checkpoint.every-steps", "None", "--train.timeout-s", TIMEOUT_S, *flags)
    words = ("train", "configs/debug.yaml", "--folder", folder, "--train.samples", 10**6, *knobs)
    with program.ranks(2, *words, variables={"PYTHONPATH": Path(__file__).parent}) as jobs:
        yield jobs


def beat(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "ranks" / f"rank_{rank:05d}.json").read_text())
    return found


def test_a_rank_that_stops(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped from outside: it can say nothing, and the backend of the other one gives up."""
    folder = tmp_path / "debug"
    with two_ranks(program, tmp_path) as (waits, stopped):
        program.until_step(waits, folder, 4)
        os.kill(stopped.pid, signal.SIGSTOP)
        said = waits.communicate(timeout=TIMEOUT_S + LATER_S)[1]
        assert waits.returncode == errors.FAILURE, said
        first = program.lines(folder / "stalls.jsonl")[0]
        assert (first["behind"], first["told_by"], first["ending"]) == ([1], 0, False)
        (line,) = first["lines"]
        assert f"pid {stopped.pid}) is stopped by a signal (SIGSTOP); it was in phase" in line
        assert "Traceback" not in said
        assert f"the run stands still: rank 1 ({socket.gethostname()}, pid {stopped.pid})" in said
        assert "rank 0 lost the others" in said or "the run is ended" in said
        assert beat(folder, 0)["code"] == errors.FAILURE
        assert "Thread" in (folder / "ranks" / "rank_00000.stack").read_text()
        assert cli.run(["ranks", str(folder)]) == errors.DONE
        table = capsys.readouterr().out
        assert "has ended with exit code 1" in table
        assert line in table
        assert cli.run(["ranks", str(folder), "--json", "--trace"]) == errors.DONE
        found = json.loads(capsys.readouterr().out)
        assert found["ranks"][1]["condition"] == "is stopped by a signal (SIGSTOP)"
        assert found["trace"], "torch has read the dump of the rank that could write one"


def test_a_rank_that_does_not_come_back_from_its_loss(program: Any, tmp_path: Path) -> None:
    """Both live: each ends by itself, and the one that is waited for leaves its stack."""
    folder = tmp_path / "debug"
    with two_ranks(program, tmp_path, "--objective", "toys.sleepy") as jobs:
        said = [job.communicate(timeout=120)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [errors.FAILURE] * 2, said
        first = program.lines(folder / "stalls.jsonl")[0]
        assert (first["behind"], first["told_by"]) == ([1], 0)
        assert f"pid {jobs[1].pid}) is in phase loss since" in first["lines"][0]
        assert "at step 2, and never entered collective no." in first["lines"][0]
        assert "in which 1 rank waits" in first["lines"][0]
        assert "sleepy.py" in (folder / "ranks" / "rank_00001.stack").read_text()
        assert [beat(folder, rank)["code"] for rank in range(2)] == [errors.FAILURE] * 2


def test_only_one_rank_hears_the_signal_and_then_a_storm(program: Any, tmp_path: Path) -> None:
    folder = tmp_path / "debug"
    with two_ranks(program, tmp_path, "--data.workers", 1) as jobs:
        program.until_step(jobs[0], folder, 4)
        workers = Path(f"/proc/{jobs[1].pid}/task/{jobs[1].pid}/children").read_text().split()
        for pid in (*map(int, workers), jobs[1].pid, *map(int, workers), jobs[1].pid):
            os.kill(pid, signal.SIGUSR2)
        for _ in range(20):
            jobs[1].send_signal(signal.SIGTERM)
            time.sleep(0.01)
        said = [job.communicate(timeout=60)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [errors.REQUEUE] * 2, said
    assert "a signal to another rank came: saved after step" in said[0]
    assert [beat(folder, rank)["code"] for rank in range(2)] == [errors.REQUEUE] * 2
    reached = program.lines(folder / "metrics.jsonl")[-1]["step"]
    assert (folder / "checkpoints" / f"step_{reached:08d}" / "COMMIT").exists()
    assert len(workers) == 1
    assert not Path(f"/proc/{workers[0]}").exists()
