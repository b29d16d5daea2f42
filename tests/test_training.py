"""The main job as a user runs it: real processes, real signals, real shards; what is promised about stopping."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain import errors
from pretrain.metrics import KEYS
from pretrain.plan.communication import Case, bytes_sent

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
DEBUG = ("train", "configs/debug.yaml", "--folder")
LONG = ("--train.samples", 1920, "--optim.ema-decay", 0.9)  # 60 steps, a checkpoint every 10


@pytest.fixture(scope="module")
def undisturbed(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    program.run(*DEBUG, folder, *LONG, "--log.batch-digest", "true", cold=True)
    return folder / "debug"


def test_a_run_leaves_what_the_docs_say(program: Any, undisturbed: Path) -> None:
    lines = program.records(undisturbed)
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
def test_a_signal_saves_ends_with_85_and_changes_nothing(
    program: Any, signal_name: str, undisturbed: Path, tmp_path: Path
) -> None:
    with program.start(*DEBUG, tmp_path, *LONG, cold=signal_name == "SIGTERM") as job:
        program.until_step(job, tmp_path / "debug", 25)
        job.send_signal(getattr(signal, signal_name))
        said = job.communicate(timeout=60)[1]
    assert job.returncode == errors.REQUEUE, said
    assert signal_name in said
    reached = program.records(tmp_path / "debug")[-1]["step"]
    assert program.newest(tmp_path / "debug").name == f"step_{reached:08d}", "the last finished step is saved"
    program.run(*DEBUG, tmp_path, *LONG)
    assert program.tensors(tmp_path / "debug") == program.tensors(undisturbed)


def test_kill_9_twice_changes_nothing(program: Any, undisturbed: Path, tmp_path: Path) -> None:
    for step in (13, 37):
        with program.start(*DEBUG, tmp_path, *LONG, "--data.workers", "1") as job:
            program.until_step(job, tmp_path / "debug", step)
            job.kill()
    program.run(*DEBUG, tmp_path, *LONG, "--data.workers", "2")
    assert program.tensors(tmp_path / "debug") == program.tensors(undisturbed)
    lines = program.records(tmp_path / "debug")
    assert [line["step"] for line in lines] == list(range(1, 61)), "one line of history"
    assert [line["loss"] for line in lines] == [line["loss"] for line in program.records(undisturbed)]


def test_a_finished_run_is_left_alone(program: Any, undisturbed: Path) -> None:
    before = program.tensors(undisturbed)
    program.run(*DEBUG, undisturbed.parent, *LONG)
    assert program.tensors(undisturbed) == before
    assert len(program.records(undisturbed)) == 60


def test_two_starts_in_one_folder(program: Any, tmp_path: Path) -> None:
    flags = ("--train.samples", 640_000)  # far more than the second start needs to come up
    with program.start(*DEBUG, tmp_path, *flags) as job:
        program.until_step(job, tmp_path / "debug", 3)
        said = program.run(*DEBUG, tmp_path, *flags, expect=errors.USER_ERROR).said
        assert f"is being trained by process {job.pid}" in said
        job.terminate()
        job.communicate(timeout=60)
    assert job.returncode == errors.REQUEUE, "the first one is not disturbed"


def test_a_rate_that_breaks_everything_ends_with_one_line(program: Any, tmp_path: Path) -> None:
    flags = ("--optim.lr", "1e30", "--optim.warmup-samples", "0")
    said = program.run(*DEBUG, tmp_path, *flags, expect=errors.USER_ERROR).said
    assert "optim.lr 1e+30: by step 20 the run had left out 19 steps of the last 128 (2, 3, 4, 5, 6, ...)" in said
    assert said.count("there is no checkpoint of an earlier step to go back to; lower the rate") == 1


def test_a_run_goes_on_without_what_it_started_from(program: Any, tmp_path: Path) -> None:
    """Resumed, evaluated and exported when the weights and the model's own JSON are gone."""
    model = tmp_path / "own.json"
    shutil.copy(ROOT / "configs" / "models" / "debug-tiny.json", model)
    program.run(*DEBUG, tmp_path, "--name", "first", "--model.name", model)
    flags = ("--name", "second", "--model.name", model, "--model.pretrained", tmp_path / "first", *LONG)
    with program.start(*DEBUG, tmp_path, *flags) as job:
        program.until(job, lambda: program.events(tmp_path / "second", "saved"))
        job.kill()
    model.unlink()
    shutil.rmtree(tmp_path / "first")
    program.run(*DEBUG, tmp_path, *flags)
    program.run("export", tmp_path / "second", tmp_path / "out", "--to", "open_clip")
    assert (tmp_path / "out" / "parity.json").exists()


def test_another_config_in_the_folder_is_refused(program: Any, undisturbed: Path) -> None:
    said = program.run(*DEBUG, undisturbed.parent, *LONG, "--optim.lr", "0.5", expect=errors.USER_ERROR).said
    assert "optim.lr: 0.001 -> 0.5" in said
    said = program.run(*DEBUG, undisturbed.parent, *LONG, "--checkpoint.resume", "false", expect=errors.USER_ERROR).said
    assert "checkpoint.resume" in said


def test_the_cached_step_trains_the_same_model(program: Any, undisturbed: Path, tmp_path: Path) -> None:
    program.run(*DEBUG, tmp_path, *LONG, "--train.micro-batch", "8")
    for one, other in zip(program.records(tmp_path / "debug"), program.records(undisturbed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


@pytest.mark.ranks
def test_other_world_sizes_see_the_same_batches(program: Any, undisturbed: Path, tmp_path: Path) -> None:
    """Two ranks, stopped; one, stopped; four to the end, by another exchange: one process's batches and losses."""
    flags = (*LONG, "--log.batch-digest", "true")
    for size, step in ((2, 15), (1, 35)):
        with program.ranks(size, *DEBUG, tmp_path, *flags) as jobs:
            program.until_step(jobs[0], tmp_path / "debug", step)
            for job in jobs:
                job.terminate()
            assert [job.wait() for job in jobs] == [errors.REQUEUE] * size
    program.run_ranks(4, *DEBUG, tmp_path, *flags, "--exchange", "bidirectional")
    found, expected = program.records(tmp_path / "debug"), program.records(undisturbed)
    assert [line["batch_digest"] for line in found] == [line["batch_digest"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    four = Case(ranks=4, rows=8, width=32, bytes_each=4)
    assert found[-1]["exchange_bytes"] == bytes_sent("bidirectional", four)
    assert found[20]["exchange_bytes"] == 0 == expected[-1]["exchange_bytes"]  # alone
    assert found[10]["exchange_bytes"] == bytes_sent("gather", Case(ranks=2, rows=16, width=32, bytes_each=4))


@pytest.mark.ranks
def test_a_killed_rank_comes_back_under_torchrun(program: Any, tmp_path: Path) -> None:
    program.run_ranks(2, *DEBUG, tmp_path / "calm", *LONG)
    folder = tmp_path / "killed" / "debug"
    with program.start(*DEBUG, tmp_path / "killed", *LONG, launcher=program.torchrun(2, "--max-restarts", "1")) as job:
        program.until_step(job, folder, 25)
        started = json.loads((folder / "events.jsonl").read_text().splitlines()[0])
        os.kill(started["pids"][1], signal.SIGKILL)
        err = job.communicate(timeout=240)[1]
    assert job.returncode == 0, err
    starts = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert [event["step"] > 0 for event in starts] == [False, True], "it went on, it did not start over"
    assert program.tensors(folder) == program.tensors(tmp_path / "calm" / "debug")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train.global-batch", "33"), "not a multiple of 2 ranks"),
        (("--data.train", "nowhere/*.tar"), "nowhere"),
    ],
)
def test_a_mistake_ends_every_rank_and_one_speaks(
    program: Any, flags: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    heard = "".join(job.said for job in program.run_ranks(2, *DEBUG, tmp_path, *flags, expect=errors.USER_ERROR))
    told = [line for line in heard.splitlines() if line.startswith("pretrain train:")]
    assert len(told) == 1, heard
    assert said in told[0]


@pytest.mark.ranks
def test_a_second_start_with_another_config_is_refused_on_all_ranks(program: Any, tmp_path: Path) -> None:
    program.run(*DEBUG, tmp_path)
    jobs = program.run_ranks(2, *DEBUG, tmp_path, "--seed", "7", expect=errors.USER_ERROR)
    heard = "".join(job.said for job in jobs)
    assert "seed: 0 -> 7" in heard
    assert heard.count("pretrain train:") == 1


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_bf16_and_several_objectives_train(program: Any, objective: str, tmp_path: Path) -> None:
    both = ("--objective", "clip,siglip", "--objective.siglip.weight", "0.1")
    flags = both if objective == "clip" else ("--objective", "siglip")
    program.run(*DEBUG, tmp_path, "--model.precision", "bf16", *flags, "--log.tensorboard", "true")
    lines = program.records(tmp_path / "debug")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert set(lines[0]["terms"]) == ({"clip", "siglip"} if objective == "clip" else {"siglip"})
    assert lines[0]["logit_bias"] is not None
    assert list((tmp_path / "debug" / "tensorboard").glob("events*"))
