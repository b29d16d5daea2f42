"""Jobs on a real SLURM of two nodes: each ends with the weights of a run that nobody disturbed, or fails clearly.

With real ranks, whose weights are compared byte for byte:

1. two nodes x two ranks, preempted by a higher partition; the checkout is edited meanwhile
2. a node is lost                                       3. requeued by hand
4. a rank is killed                                     5. torchrun's agents, preempted
6. DeepSpeed's launcher, preempted                      7. an array of seeds, one of them warned of its time limit

With a stub in place of the interpreter:

8. the time limit itself, and its warning               9. a mistake (exit code 2) is not repeated
10. failures are forgiven as often as asked             11. `scancel` during the run, and 12. during the check
13. asked to make room, and 14. during the check        15. the doctor names a node; later submissions avoid it too
16. the doctor names none: the config is at fault       17. a site's own check fails on a node
18. a port that somebody holds                          19. apptainer's words, and 20. sbatch refuses the job

The doctor itself on every rank, and all that a person types: `test_walk.py`.
"""

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

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
LENGTH = ("--train.samples", 32 * 60, "--checkpoint.every-steps", 20, "--checkpoint.keep-last", 9)
ONE_EACH = ("--cluster", "cpu", "--nodes", 2, "--ranks-per-node", 1, "--preflight", "none")


def tensors(run: Path) -> dict[str, bytes]:
    checkpoint = max((run / "checkpoints").glob("step_*"))
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*.safetensors")}


class Plain:
    """The same run, undisturbed and without SLURM; it goes on while jobs wait for their turn."""

    def __init__(self, runs: Path, ranks: int, *flags: object) -> None:
        alone = [sys.executable, "-m", "pretrain"]
        agents = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = alone if ranks == 1 else [*agents, "-m", "pretrain"]
        words = [*command, "train", "configs/debug.yaml", "--folder", str(runs), "--name", "plain", *map(str, flags)]
        self.run = runs / "plain"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        how: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(words, cwd=ROOT, env=environment, **how)

    def tensors(self) -> dict[str, bytes]:
        said = self.process.communicate(timeout=300)[0] if self.process.stdout is not None else ""
        self.process.stdout = None
        assert self.process.returncode == 0, said
        return tensors(self.run)


def nothing_was_lost(job: Any) -> None:
    """Every start goes on at the step at which the stop before it had saved."""
    starts = [event["step"] for event in job.events("start")]
    stops = [event["step"] for event in job.events("stopped")]
    assert starts == [0, *stops]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tmp_path_factory.mktemp("plain"), 2, *LENGTH)


@pytest.fixture(scope="module")
def short_of_time(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A job whose minute passes on a node of its own, while other tests have the others."""
    options = ("--partition", "aside", "--ranks-per-node", 1, "--time", 1, "--grace-s", 58)
    return cluster.stub(tmp_path_factory.mktemp("limit"), *options, STUB="wait")


def test_four_ranks_preempted(cluster: Any, short_of_time: Any, tmp_path: Path) -> None:
    """Two nodes of two ranks; the checkout and the config that it was submitted from are spoilt meanwhile."""
    assert short_of_time.job  # its minute begins
    undisturbed = Plain(tmp_path, 4, *LENGTH)
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "pretrain", checkout / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", checkout / "configs")
    flags = ("--cluster", "cpu", "--nodes", 2, "--preflight", "none", *LENGTH)
    job = cluster.launch(tmp_path, *flags, "--name", "four", checkout=checkout)
    (checkout / "pretrain" / "train.py").write_text("raise SystemExit('edited')\n")
    (checkout / "configs" / "debug.yaml").write_text("optim: {lr: 9.0}\n")

    job.until_step(5)
    cluster.preempt()
    job.go_on()
    job.until("COMPLETED")

    assert [event["signal"] for event in job.events("stopped")] == ["SIGTERM"]
    assert [event["ranks"] for event in job.events("start")] == [4, 4]
    nothing_was_lost(job)
    assert tensors(job.run) == undisturbed.tensors()


def test_a_lost_node_a_requeue_and_a_killed_rank(cluster: Any, two_ranks: Plain, tmp_path: Path) -> None:
    job = cluster.launch(tmp_path, *ONE_EACH, *LENGTH, "--name", "lost")
    job.until_step(22)
    cluster.lose("n2")
    job.until("REQUEUED")
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
    assert tensors(job.run) == two_ranks.tensors()


@pytest.mark.parametrize("form", ["torchrun", "deepspeed"])
def test_other_launchers_on_the_nodes(form: str, cluster: Any, two_ranks: Plain, tmp_path: Path) -> None:
    if form == "deepspeed":
        pytest.importorskip("deepspeed")
    job = cluster.launch(tmp_path, *ONE_EACH, *LENGTH, "--name", form, "--form", form)
    job.until_step(5)
    cluster.preempt()
    job.go_on()
    job.until("COMPLETED")
    assert len(job.events("start")) == 2
    nothing_was_lost(job)
    assert tensors(job.run) == two_ranks.tensors()


def test_an_array_of_seeds_one_of_them_short_of_time(cluster: Any, tmp_path: Path) -> None:
    flags = ("--cluster", "cpu", "--ranks-per-node", 1, "--preflight", "none", *LENGTH, "--name", "seeds")
    undisturbed = Plain(tmp_path, 1, *LENGTH, "--seed", 5)
    job = cluster.launch(tmp_path, *flags, "--seeds", 3, 5)
    runs = {
        seed: type(job)(cluster, f"{job.job}_{seed}", tmp_path / f"seeds-seed{seed}", job.script, job.log)
        for seed in (3, 5)
    }
    runs[5].until_step(5)
    cluster.tell("scancel", "--batch", "--signal=USR2", runs[5].job)  # what SLURM does before the time limit
    runs[5].go_on()
    for run in runs.values():
        run.until("COMPLETED")
    assert len(runs[5].events("start")) == 2
    nothing_was_lost(runs[5])
    assert tensors(runs[3].run) != tensors(runs[5].run)
    assert tensors(runs[5].run) == undisturbed.tensors()


def test_mistakes_are_not_repeated_and_failures_as_often_as_asked(cluster: Any, tmp_path: Path) -> None:
    one = ("--ranks-per-node", 1, "--preflight", "none")
    mistake = cluster.stub(tmp_path / "mistake", "--nodes", 2, *one, STUB="2")
    failure = cluster.stub(tmp_path / 'it\'s "odd" $HOME', *one, "--max-restarts", 1, STUB="1")
    agents = ("--form", "torchrun", "--nodes", 2, "--ranks-per-node", 2, "--cpus-per-rank", 1)
    config = cluster.stub(tmp_path / "config", *agents, DOCTOR="2")
    for job in (mistake, config):
        assert job.until("FAILED", "REQUEUED") == "FAILED NonZeroExitCode"
        assert "not requeued" in job.said()
    assert mistake.said().count("train on n1") == mistake.said().count("train on n2") == 1
    assert config.said().count("doctor on n1") == config.said().count("doctor on n2") == 2  # where an agent starts two
    assert "--nnodes on" not in config.said()
    failure.go_on()
    failure.until("FAILED")
    assert "exit code 1, failure 1; 1 are forgiven\n" in failure.said()
    assert "exit code 1, failure 2; 1 are forgiven: not requeued" in failure.said()


def test_a_cancelled_job_stays_cancelled(cluster: Any, tmp_path: Path) -> None:
    running = cluster.stub(tmp_path / "running", "--ranks-per-node", 1, STUB="wait")
    checking = cluster.stub(tmp_path / "checking", "--ranks-per-node", 1, DOCTOR="wait")
    cluster.until(lambda: "train waits" in running.said(), "the run waits", running)
    cluster.until(lambda: "doctor waits" in checking.said(), "the check waits", checking)
    cluster.tell("scancel", running.job, checking.job)
    for job in (running, checking):
        assert job.until("CANCELLED", "REQUEUED").startswith("CANCELLED")
        assert "left to it" in job.said()


def test_a_job_asked_to_make_room_or_stopped_during_the_check_waits_again(cluster: Any, tmp_path: Path) -> None:
    two = ("--nodes", 2, "--ranks-per-node", 1, "--max-restarts", 0)
    checking = cluster.stub(tmp_path / "checking", *two, DOCTOR="wait")
    running = cluster.stub(tmp_path / "running", *two, STUB="wait")
    cluster.until(lambda: checking.said().count("doctor waits") == 2, "the check waits", checking)
    cluster.until(lambda: running.said().count("train waits") == 2, "the run waits", running)
    cluster.tell("scancel", "--batch", "--signal=USR2", checking.job)
    cluster.tell("scancel", "--signal=TERM", running.job)
    for job in (checking, running):
        job.until("REQUEUED")
        assert "requeued: it was asked to stop" in job.said()
        cluster.tell("scancel", job.job)
    assert "train on" not in checking.said()


@pytest.mark.parametrize(("check", "variables"), [("doctor", {"DOCTOR": "n1"}), ("[ $SLURMD_NODENAME != n1 ]", {})])
def test_a_bad_node_is_left_out(check: str, variables: dict[str, str], cluster: Any, tmp_path: Path) -> None:
    job = cluster.stub(tmp_path, "--ranks-per-node", 2, "--preflight", check, **variables)
    job.until("REQUEUED")
    assert "requeued: exit code 1, failure 1" in job.said()
    assert "left out from now on: n1" in job.said()
    if check == "doctor":
        again = cluster.stub(tmp_path, "--ranks-per-node", 1, "--exclude", "n3")
        assert "#SBATCH --exclude=n1,n3" in again.script.read_text().splitlines()
        again.until("COMPLETED")
        assert "train on n2, attempt 0" in again.said()
        cluster.tell("scancel", job.job)
        return
    job.go_on()
    job.until("COMPLETED")
    assert "train on n2, attempt 1" in job.said()
    assert "train on n1" not in job.said()


def test_a_port_that_is_taken_is_passed_over(cluster: Any, tmp_path: Path) -> None:
    one = ("--ranks-per-node", 1, "--preflight", "none")
    next_job = int(cluster.stub(tmp_path / "a", *one).job) + 1
    port = 10_000 + next_job % 20_000
    with socket.create_server(("127.0.0.1", port)):
        job = cluster.stub(tmp_path / "b", *one)
        job.until("COMPLETED")
    assert job.job == str(next_job)
    assert f"meets at {port + 1}" in job.said()


def test_apptainer_gets_words_that_lead_to_the_ranks(cluster: Any, tmp_path: Path) -> None:
    """A stand-in for apptainer says how it was called and becomes the program in the image."""
    program = tmp_path / "apptainer"
    program.write_text('#!/bin/bash\necho "called: $*"\nwhile [ "$1" != image.sif ]; do shift; done\nexec "${@:2}"\n')
    program.chmod(0o755)
    image = ("--container", "image.sif", "--container-tool", "apptainer", "--mounts", "/data:/data")
    job = cluster.stub(tmp_path / "a b", "--ranks-per-node", 1, *image, "--setup", f"PATH={tmp_path}:$PATH")
    job.until("COMPLETED")
    where = tmp_path / "a b"
    assert (
        job.said().count(f"called: exec --bind {where}:{where},/data:/data --pwd {where} image.sif {where}/python") == 2
    )
    assert "doctor on" in job.said()
    assert "train on" in job.said()


def test_what_slurm_refuses_is_told_in_one_line(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"pretrain launch: sbatch refuses .* invalid partition"):
        cluster.launch(tmp_path, *ONE_EACH, "--partition", "moon")


def test_the_time_limit_warns_in_time(cluster: Any, short_of_time: Any) -> None:
    assert short_of_time.until("REQUEUED", "FAILED", "TIMEOUT").startswith("REQUEUED")  # SLURM looks every half minute
    assert "requeued: it was asked to stop" in short_of_time.said()
    cluster.tell("scancel", short_of_time.job)
