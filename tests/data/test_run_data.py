"""The data plane in a run, as a user starts it: what is recorded, and what a lost worker looks like."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain import errors, runfile
from pretrain.signals import StopRequest
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


DEBUG = ("train", "configs/debug.yaml", "--folder")


def test_a_killed_worker_ends_the_run_with_its_reason_and_the_next_start_goes_on(program: Any, tmp_path: Path) -> None:
    run, flags = tmp_path / "debug", ("--train.samples", 1_000_000)
    with program.start(*DEBUG, tmp_path, *flags, "--data.workers", 2) as job:
        program.until_step(job, run, 13)
        pids = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
        os.kill(pids[0], signal.SIGKILL)
        _, told = job.communicate(timeout=60)
    assert job.returncode == errors.FAILURE, told
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert f"data.workers: worker 0 of rank 0 (pid {pids[0]}) was killed by signal 9 (SIGKILL" in last
    with program.start(*DEBUG, tmp_path, *flags, "--log.every-steps", 1) as again:
        program.until(again, lambda: len(program.events(run, "start")) == 2)
        again.kill()
    assert program.events(run, "start")[1]["step"] >= 10


def test_records_count_captions_that_were_cut(
    program: Any, tmp_path: Path, tar_writer: Any, picture_bytes: Any
) -> None:
    """Of every 32 samples, 8 have more words than the model takes tokens."""
    texts = [b"a short one", b"and another", b"a third", b"many words " * 20] * 8
    samples = {f"{n:03d}": {"png": picture_bytes(n), "txt": text} for n, text in enumerate(texts)}
    shard = tar_writer(tmp_path / "a.tar", samples)
    program.run(*DEBUG, tmp_path, "--train.samples", 64, "--data.train", shard)
    records = program.records(tmp_path / "debug")
    assert [record["truncated"] for record in records] == [8, 8]
    assert all(0 <= record["data_wait_s"] <= record["step_s"] for record in records)


def test_a_run_goes_on_with_as_many_synthetic_samples_as_it_began_with(tmp_path: Path) -> None:
    def run(samples: int) -> None:
        flags = ["--folder", str(tmp_path), "--train.samples", "64", "--data.train", f"synthetic:{samples}"]
        with StopRequest() as stop:
            train(runfile.load(ROOT / "configs" / "debug.yaml", flags), stop)

    run(40)
    with pytest.raises(
        errors.UserError, match=r"data\.train: .*synthetic:40 is missing .*synthetic:48 is new"
    ) as caught:
        run(48)
    assert "\n" not in str(caught.value)
