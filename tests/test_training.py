"""The main job as a user runs it: real processes, real signals, real shards; what is promised about stopping."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import errors
from pretrain.metrics import KEYS
from pretrain.plan.communication import Case, bytes_sent

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
ALONE = [sys.executable, "-m", "pretrain"]


def under_torchrun(size: int, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return [*launcher, *options, "-m", "pretrain"]


def start(command: list[str], folder: Path, *flags: object, config: str = "debug") -> subprocess.Popen[str]:
    words = [*command, "train", f"configs/{config}.yaml", "--folder", str(folder), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(command: list[str], folder: Path, *flags: object, expect: int = 0, config: str = "debug") -> str:
    """Output of a finished start; its exit code is `expect`."""
    with start(command, folder, *flags, config=config) as job:
        out, err = job.communicate(timeout=240)
    assert job.returncode == expect, f"{out}\n{err}"
    return out + err


def records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    )


def until_step(job: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while job.poll() is None and not any(record["step"] >= step for record in records(folder)):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step_*"))


def tensors(folder: Path) -> dict[str, bytes]:
    checkpoint = newest(folder)
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*.safetensors")}


LONG = ("--train.samples", 1920, "--optim.ema-decay", 0.9)  # 60 steps, a checkpoint every 10


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(ALONE, folder, *LONG, "--log.batch-digest", "true")
    return folder / "debug"


def test_a_run_leaves_what_the_docs_say(undisturbed: Path) -> None:
    lines = records(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert tuple(lines[0]) == KEYS
    assert lines[0]["loss"] == sum(lines[0]["terms"].values())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["grad_norm"]["total"] > 0 for line in lines)
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == [
        "step_00000040",
        "step_00000050",
        "step_00000060",
    ]
    for name in ("config.yaml", "environment.json", "events.jsonl"):
        assert (undisturbed / name).exists()


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_ends_with_85_and_changes_nothing(signal_name: str, undisturbed: Path, tmp_path: Path) -> None:
    with start(ALONE, tmp_path, *LONG) as job:
        until_step(job, tmp_path / "debug", 25)
        job.send_signal(getattr(signal, signal_name))
        said = job.communicate(timeout=60)[1]
    assert job.returncode == errors.REQUEUE, said
    assert signal_name in said
    reached = records(tmp_path / "debug")[-1]["step"]
    assert newest(tmp_path / "debug").name == f"step_{reached:08d}", "the last finished step is saved"
    run(ALONE, tmp_path, *LONG)
    assert tensors(tmp_path / "debug") == tensors(undisturbed)


def test_kill_9_twice_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    for step in (13, 37):
        with start(ALONE, tmp_path, *LONG, "--data.workers", "1") as job:
            until_step(job, tmp_path / "debug", step)
            job.kill()
    run(ALONE, tmp_path, *LONG, "--data.workers", "2")
    assert tensors(tmp_path / "debug") == tensors(undisturbed)
    lines = records(tmp_path / "debug")
    assert [line["step"] for line in lines] == list(range(1, 61)), "one line of history"
    assert [line["loss"] for line in lines] == [line["loss"] for line in records(undisturbed)]


def test_a_finished_run_is_left_alone(undisturbed: Path) -> None:
    before = tensors(undisturbed)
    run(ALONE, undisturbed.parent, *LONG)
    assert tensors(undisturbed) == before
    assert len(records(undisturbed)) == 60


def test_two_starts_in_one_folder(tmp_path: Path) -> None:
    flags = ("--train.samples", 640_000)  # far more than the second start needs to come up
    with start(ALONE, tmp_path, *flags) as job:
        until_step(job, tmp_path / "debug", 3)
        said = run(ALONE, tmp_path, *flags, expect=errors.USER_ERROR)
        assert f"is being trained by process {job.pid}" in said
        job.terminate()
        job.communicate(timeout=60)
    assert job.returncode == errors.REQUEUE, "the first one is not disturbed"


def test_a_rate_that_breaks_everything_ends_with_one_line(tmp_path: Path) -> None:
    said = run(ALONE, tmp_path, "--optim.lr", "1e30", "--optim.warmup-samples", "0", expect=errors.USER_ERROR)
    assert "optim.lr 1e+30: by step 20 the run had left out 19 steps of the last 128 (2, 3, 4, 5, 6, ...)" in said
    assert said.count("there is no checkpoint of an earlier step to go back to; lower the rate") == 1


def test_a_run_goes_on_without_what_it_started_from(tmp_path: Path) -> None:
    """Resumed, evaluated and exported when the weights and the model's own JSON are gone."""
    model = tmp_path / "own.json"
    shutil.copy(ROOT / "configs" / "models" / "debug-tiny.json", model)
    run(ALONE, tmp_path, "--name", "first", "--model.name", model)
    flags = ("--name", "second", "--model.name", model, "--model.pretrained", tmp_path / "first", *LONG)
    with start(ALONE, tmp_path, *flags) as job:
        until_step(job, tmp_path / "second", 12)
        job.kill()
    model.unlink()
    shutil.rmtree(tmp_path / "first")
    run(ALONE, tmp_path, *flags)
    words = [*ALONE, "export", str(tmp_path / "second"), str(tmp_path / "out"), "--to", "open_clip"]
    subprocess.run(words, cwd=ROOT, check=True)
    assert (tmp_path / "out" / "parity.json").exists()


def test_another_config_in_the_folder_is_refused(undisturbed: Path) -> None:
    said = run(ALONE, undisturbed.parent, *LONG, "--optim.lr", "0.5", expect=errors.USER_ERROR)
    assert "optim.lr: 0.001 -> 0.5" in said
    said = run(ALONE, undisturbed.parent, *LONG, "--checkpoint.resume", "false", expect=errors.USER_ERROR)
    assert "checkpoint.resume" in said


def test_the_cached_step_trains_the_same_model(undisturbed: Path, tmp_path: Path) -> None:
    run(ALONE, tmp_path, *LONG, "--train.micro-batch", "8")
    for one, other in zip(records(tmp_path / "debug"), records(undisturbed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


@pytest.mark.ranks
def test_other_world_sizes_see_the_same_batches(undisturbed: Path, tmp_path: Path) -> None:
    """Two ranks, stopped; one, stopped; four to the end, by another exchange: one process's batches and losses."""
    flags = (*LONG, "--log.batch-digest", "true")
    for command, step in ((under_torchrun(2), 15), (ALONE, 35)):
        with start(command, tmp_path, *flags) as job:
            until_step(job, tmp_path / "debug", step)
            job.terminate()
            job.communicate(timeout=60)
    run(under_torchrun(4), tmp_path, *flags, "--exchange", "bidirectional")
    found, expected = records(tmp_path / "debug"), records(undisturbed)
    assert [line["batch_digest"] for line in found] == [line["batch_digest"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    four = Case(ranks=4, rows=8, width=32, bytes_each=4)
    assert found[-1]["exchange_bytes"] == bytes_sent("bidirectional", four)
    assert found[20]["exchange_bytes"] == 0 == expected[-1]["exchange_bytes"]  # alone
    assert found[10]["exchange_bytes"] == bytes_sent("gather", Case(ranks=2, rows=16, width=32, bytes_each=4))


@pytest.mark.ranks
def test_a_killed_rank_comes_back_under_torchrun(tmp_path: Path) -> None:
    run(under_torchrun(2), tmp_path / "calm", *LONG)
    folder = tmp_path / "killed" / "debug"
    with start(under_torchrun(2, "--max-restarts", "1"), tmp_path / "killed", *LONG) as job:
        until_step(job, folder, 25)
        started = json.loads((folder / "events.jsonl").read_text().splitlines()[0])
        os.kill(started["pids"][1], signal.SIGKILL)
        err = job.communicate(timeout=240)[1]
    assert job.returncode == 0, err
    starts = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert [event["step"] > 0 for event in starts] == [False, True], "it went on, it did not start over"
    assert tensors(folder) == tensors(tmp_path / "calm" / "debug")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train.global-batch", "33"), "not a multiple of 2 ranks"),
        (("--data.train", "nowhere/*.tar"), "nowhere"),
    ],
)
def test_a_mistake_ends_every_rank_and_one_speaks(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    heard = run(under_torchrun(2), tmp_path, *flags, expect=1)  # torchrun's own code for a failed rank
    told = [line for line in heard.splitlines() if line.startswith("pretrain train:")]
    assert len(told) == 1, heard
    assert said in told[0]
    assert heard.count("exitcode  : 2") + heard.count("exitcode: 2") >= 1, heard


@pytest.mark.ranks
def test_a_second_start_with_another_config_is_refused_on_all_ranks(tmp_path: Path) -> None:
    run(ALONE, tmp_path)
    heard = run(under_torchrun(2), tmp_path, "--seed", "7", expect=1)
    assert "seed: 0 -> 7" in heard
    assert heard.count("pretrain train:") == 1


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_bf16_and_several_objectives_train(objective: str, tmp_path: Path) -> None:
    both = ("--objective", "clip,siglip", "--objective.siglip.weight", "0.1")
    flags = both if objective == "clip" else ("--objective", "siglip")
    run(ALONE, tmp_path, "--model.precision", "bf16", *flags, "--log.tensorboard", "true")
    lines = records(tmp_path / "debug")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert set(lines[0]["terms"]) == ({"clip", "siglip"} if objective == "clip" else {"siglip"})
    assert lines[0]["logit_bias"] is not None
    assert list((tmp_path / "debug" / "tensorboard").glob("events*"))
