"""torchrun and DeepSpeed on this machine, started by `pretrain launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ranks]
LENGTH = ("--train.samples", "1920", "--checkpoint.every-steps", "20")
TWO = ("--gpus-per-node", "0", "--ranks-per-node", "2")


def launch(kind: str, folder: Path, *flags: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "pretrain", "launch", kind, "configs/debug.yaml", *TWO, *LENGTH, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, "--folder", str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def events(folder: Path, kind: str) -> list[dict]:
    path = folder / "debug" / "events.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [event for line in lines if line.endswith("\n") and (event := json.loads(line))["event"] == kind]


def until_saved(job: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not events(folder, "saved"):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def tensors(folder: Path) -> dict[str, bytes]:
    checkpoint = max((folder / "debug" / "checkpoints").glob("step_*"))
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*.safetensors")}


def test_a_rank_killed_under_torchrun_then_deepspeed_undisturbed(tmp_path: Path) -> None:
    """torchrun starts all ranks again, from the checkpoint; DeepSpeed's launcher ends with the same weights."""
    with launch("torchrun", tmp_path / "torchrun", "--max-restarts", "1") as job:
        until_saved(job, tmp_path / "torchrun")
        os.kill(events(tmp_path / "torchrun", "start")[0]["pids"][1], signal.SIGKILL)
        said = job.communicate(timeout=240)[0]
    assert job.returncode == 0, said
    assert [event["step"] for event in events(tmp_path / "torchrun", "start")] == [0, 20]

    pytest.importorskip("deepspeed")
    with launch("deepspeed", tmp_path / "deepspeed") as job:
        said = job.communicate(timeout=240)[0]
    assert job.returncode == 0, said
    assert [event["ranks"] for event in events(tmp_path / "deepspeed", "start")] == [2]
    assert (tmp_path / "deepspeed" / "debug" / "launch" / "hostfile").read_text() == "localhost slots=2\n"
    assert tensors(tmp_path / "torchrun") == tensors(tmp_path / "deepspeed")


def test_a_program_that_forgets_its_children_ends_after_them() -> None:
    """As DeepSpeed's runner, the shell in the middle would die of TERM and leave the loop behind."""
    loop = "(trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done) & wait $!"
    code = f"import sys; from pretrain.launch import handing; sys.exit(handing.lead(['bash', '-c', {loop!r}]))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 7
