"""Runs under DeepSpeed as a user starts them: torchrun and bare environment variables, signals, and other engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import errors

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ranks]
SHORT = ("--train.samples", "384", "--optim.ema-decay", "0.9", "--optim.schedule", "constant")  # 12 steps
ZERO = ("--engine", "deepspeed", "--parallel.zero-stage", "3")


def start(folder: Path, ranks: int, *flags: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = [sys.executable, *launcher, "-m", "pretrain", "train", "configs/debug.yaml", "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, *SHORT, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(job: subprocess.Popen[str], expect: int = 0) -> str:
    out, err = job.communicate(timeout=240)
    assert job.returncode == expect, f"{out}\n{err}"
    return out + err


def records(folder: Path) -> list[dict]:
    path = folder / "debug" / "metrics.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def stop_at(job: subprocess.Popen[str], folder: Path, step: int) -> None:
    """A SIGTERM to the launcher once a step is logged; it ends with the step saved."""
    deadline = time.monotonic() + 200
    while job.poll() is None and not any(record["step"] >= step for record in records(folder)):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)
    job.terminate()
    job.communicate(timeout=100)


def saved(folder: Path) -> dict[str, bytes]:
    newest = max((folder / "debug" / "checkpoints").glob("step_*"))
    return {str(path.relative_to(newest)): path.read_bytes() for path in newest.rglob("*.safetensors")}


def test_a_stopped_run_goes_on_bitwise(tmp_path: Path) -> None:
    finish(start(tmp_path / "calm", 2, *ZERO))
    stop_at(start(tmp_path / "stopped", 2, *ZERO), tmp_path / "stopped", 4)
    assert 4 <= records(tmp_path / "stopped")[-1]["step"] < 12
    finish(start(tmp_path / "stopped", 2, *ZERO))
    assert saved(tmp_path / "stopped") == saved(tmp_path / "calm")


def test_a_run_changes_engines_and_ranks(tmp_path: Path) -> None:
    """ddp on two ranks, ZeRO 3 alone, ZeRO 2 on two, ddp: one process's losses, one line of history."""
    finish(start(tmp_path / "alone", 1, "--engine", "single"))
    stop_at(start(tmp_path, 2, "--engine", "ddp"), tmp_path, 2)
    stop_at(start(tmp_path, 1, *ZERO), tmp_path, 5)
    stop_at(start(tmp_path, 2, "--engine", "deepspeed", "--train.micro-batch", "4"), tmp_path, 8)
    finish(start(tmp_path, 2, "--engine", "ddp"))
    found, wanted = records(tmp_path), records(tmp_path / "alone")
    assert [line["step"] for line in found] == list(range(1, 13))
    for one, other in zip(found, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_ranks_started_by_hand_and_a_contradiction(tmp_path: Path) -> None:
    """No launcher at all; what is wrong is said once, and every rank ends with the user's code."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 32}))
    words = [sys.executable, "-m", "pretrain", "train", "configs/debug.yaml", "--folder", str(tmp_path), *SHORT]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(23000 + os.getpid() % 9000)}
    for flags, code in (((), 0), (("--name", "wrong", "--train.global-batch", "64"), errors.USER_ERROR)):
        jobs = [
            subprocess.Popen(
                [*words, "--engine", "deepspeed", "--parallel.deepspeed", str(file), *flags],
                cwd=ROOT, env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        said = "".join(finish(job, code) for job in jobs)
        if code:
            assert said.count("train_batch_size 32 contradicts train.global_batch 64") == 1
    assert records(tmp_path)[-1]["step"] == 12
