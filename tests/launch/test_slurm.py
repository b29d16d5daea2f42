"""Jobs on a real SLURM of two nodes: what the scheduler does to them, and that the weights are those of a quiet run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
LENGTH = ("--train.samples", 32 * 60, "--checkpoint.every-steps", 20, "--checkpoint.keep-last", 9)
ONE_EACH = ("--cluster", "cpu", "--nodes", 2, "--ranks-per-node", 1)

STUB = """#!/bin/bash
# Stands in for the interpreter: ends with the code in STUB, or, asked to stop, as a run that has saved.
echo "stub on $SLURMD_NODENAME, attempt ${SLURM_RESTART_COUNT:-0}, meets at $MASTER_PORT"
[ "$STUB" != wait ] || { trap 'exit 85' TERM; echo waits; while :; do sleep 0.1; done; }
exit "${STUB:-0}"
"""


def tensors(run: Path) -> dict[str, bytes]:
    checkpoint = max((run / "checkpoints").glob("step_*"))
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*.safetensors")}


def weights(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*")) / "weights" / "model.safetensors"


def plain(runs: Path, ranks: int, *flags: object) -> Path:
    """The same run, undisturbed and without SLURM."""
    alone = [sys.executable, "-m", "pretrain"]
    agents = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = alone if ranks == 1 else [*agents, "-m", "pretrain"]
    words = [*command, "train", "configs/debug.yaml", "--folder", str(runs), "--name", "plain", *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return runs / "plain"


def nothing_was_lost(job: Any) -> None:
    """Every start goes on at the step at which the stop before it had saved."""
    starts = [event["step"] for event in job.events("start")]
    stops = [event["step"] for event in job.events("stopped")]
    assert starts == [0, *stops]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("plain"), 2, *LENGTH)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    path = tmp_path_factory.mktemp("stub") / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return ("--cluster", "cpu", "--python", path)


def test_time_limit_and_preemption_of_four_ranks(cluster: Any, two_ranks: Path, tmp_path: Path) -> None:
    """Two nodes of two ranks; the checkout and the config that it was submitted from are spoilt meanwhile."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "pretrain", checkout / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", checkout / "configs")
    flags = ("--cluster", "cpu", "--nodes", 2, *LENGTH)
    job = cluster.launch(tmp_path, *flags, "--name", "four", checkout=checkout)
    (checkout / "pretrain" / "train.py").write_text("raise SystemExit('edited')\n")
    (checkout / "configs" / "debug.yaml").write_text("optim: {lr: 9.0}\n")

    job.until_step(5)
    cluster.tell("scancel", "--batch", "--signal=USR2", job.job)  # what the time limit does, without its half minute
    job.until("PENDING")
    job.go_on()
    job.until_step(20, starts=2)
    cluster.preempt()
    job.until("PENDING")
    job.go_on()
    job.until("COMPLETED")

    assert [event["signal"] for event in job.events("stopped")] == ["SIGTERM", "SIGTERM"]
    assert [event["ranks"] for event in job.events("start")] == [4, 4, 4]
    nothing_was_lost(job)
    # On more than two ranks sums are rounded otherwise after a new start: losses differ in the eighth digit.
    ours, theirs = load_file(weights(job.run)), load_file(weights(two_ranks))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[name] - theirs[name]).max() for name in ours) < 5e-5


def test_a_lost_node_a_requeue_and_a_killed_rank(cluster: Any, two_ranks: Path, tmp_path: Path) -> None:
    job = cluster.launch(tmp_path, *ONE_EACH, *LENGTH, "--name", "lost")
    job.until_step(22)
    cluster.lose("n2")
    job.until("PENDING")
    cluster.repair("n2")
    job.go_on()
    job.until_step(25, starts=2)
    cluster.tell("scontrol", "requeue", job.job)  # by somebody who needs the nodes
    job.go_on()
    job.until_step(42, starts=3)
    os.kill(job.events("start")[-1]["pids"][1], signal.SIGKILL)
    job.go_on()
    job.until("COMPLETED")
    first, lost, again, killed = (event["step"] for event in job.events("start"))
    (stopped,) = job.events("stopped")
    assert (first, lost, again, killed) == (0, 20, stopped["step"], 40)
    assert tensors(job.run) == tensors(two_ranks)


@pytest.mark.parametrize("form", ["torchrun", "deepspeed"])
def test_other_launchers_on_the_nodes(form: str, cluster: Any, two_ranks: Path, tmp_path: Path) -> None:
    if form == "deepspeed":
        pytest.importorskip("deepspeed")
    job = cluster.launch(tmp_path, *ONE_EACH, *LENGTH, "--name", form, "--form", form)
    job.until_step(5)
    cluster.preempt()
    job.until("PENDING")
    job.go_on()
    job.until("COMPLETED")
    assert len(job.events("start")) == 2
    nothing_was_lost(job)
    assert tensors(job.run) == tensors(two_ranks)


def test_an_array_of_seeds_one_of_them_stopped(cluster: Any, tmp_path: Path) -> None:
    flags = ("--cluster", "cpu", "--ranks-per-node", 1, *LENGTH, "--name", "seeds", "--seeds", 3, 5)
    job = cluster.launch(tmp_path, *flags)
    runs = {
        seed: type(job)(cluster, f"{job.job}_{seed}", tmp_path / f"seeds-seed{seed}", job.script, job.log)
        for seed in (3, 5)
    }
    runs[5].until_step(5)
    cluster.tell("scancel", "--signal=TERM", runs[5].job)
    runs[5].until("PENDING")
    runs[5].go_on()
    for run in runs.values():
        run.until("COMPLETED")
    assert len(runs[5].events("start")) == 2
    nothing_was_lost(runs[5])
    assert tensors(runs[3].run) != tensors(runs[5].run)
    assert tensors(runs[5].run) == tensors(plain(tmp_path, 1, *LENGTH, "--seed", 5))


def test_a_mistake_is_not_repeated(cluster: Any, stub: tuple[object, ...], tmp_path: Path) -> None:
    job = cluster.launch(tmp_path, *stub, "--nodes", 2, STUB="2")
    assert job.until("FAILED", "PENDING") == "FAILED NonZeroExitCode"
    assert job.said().count("stub on n1") == job.said().count("stub on n2") == 2
    assert "not requeued" in job.said()


def test_a_failure_is_forgiven_as_often_as_asked(cluster: Any, stub: tuple[object, ...], tmp_path: Path) -> None:
    job = cluster.launch(tmp_path, *stub, "--max-restarts", 1, STUB="1")
    job.go_on()
    job.until("FAILED")
    assert "exit code 1, failure 1; 1 are forgiven\n" in job.said()
    assert "exit code 1, failure 2; 1 are forgiven: not requeued" in job.said()


def test_a_cancelled_job_stays_cancelled(cluster: Any, stub: tuple[object, ...], tmp_path: Path) -> None:
    job = cluster.launch(tmp_path, *stub, STUB="wait")
    cluster.until(lambda: "waits" in job.said(), "the stub waits", job)
    cluster.tell("scancel", job.job)
    assert job.until("CANCELLED", "PENDING").startswith("CANCELLED")
    assert "left to it" in job.said()


def test_the_time_limit_warns_in_time(cluster: Any, stub: tuple[object, ...], tmp_path: Path) -> None:
    job = cluster.launch(tmp_path, *stub, "--time", 1, "--grace-s", 58, STUB="wait")
    assert job.until("PENDING", "FAILED", "TIMEOUT").startswith("PENDING")  # SLURM looks every half minute
    assert "requeued: it was asked to stop" in job.said()
    cluster.tell("scancel", job.job)


def test_a_bad_node_is_left_out(cluster: Any, stub: tuple[object, ...], tmp_path: Path) -> None:
    job = cluster.launch(tmp_path, *stub, "--preflight", "[ $SLURMD_NODENAME != n1 ]")
    job.go_on()
    job.until("COMPLETED")
    assert "left out from now on: n1" in job.said()
    assert "stub on n2, attempt 1" in job.said()
    assert "stub on n1" not in job.said()
    again = cluster.launch(tmp_path, *stub)
    assert "#SBATCH --exclude=n1" in again.script.read_text()
    again.until("COMPLETED")
    assert "stub on n2" in again.said()


def test_a_port_that_is_taken_is_passed_over(cluster: Any, stub: tuple[object, ...], tmp_path: Path) -> None:
    next_job = int(cluster.launch(tmp_path / "a", *stub).job) + 1
    with socket.create_server(("127.0.0.1", 10_000 + next_job)):
        job = cluster.launch(tmp_path / "b", *stub)
        job.until("COMPLETED")
    assert job.job == str(next_job)
    assert f"meets at {10_001 + next_job}" in job.said()


def test_what_slurm_refuses_is_told_in_one_line(cluster: Any, stub: tuple[object, ...], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"pretrain launch: sbatch refuses .* invalid partition"):
        cluster.launch(tmp_path, *stub, "--partition", "moon")
