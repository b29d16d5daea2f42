"""One run through several engines and world sizes, as a user starts it; and stopped and taken up bit for bit."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pretrain import runfile, train
from pretrain.errors import Stopped, UserError
from pretrain.signals import StopRequest
from pretrain.world import World

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
DEBUG = ("train", "configs/debug.yaml", "--folder")
FLAGS = ("--train.samples", "768", "--optim.ema-decay", "0.9", "--log.batch-digest", "true")  # 24 steps
DEEPSPEED = ("--engine", "deepspeed", "--parallel.deepspeed")


def test_one_run_under_every_engine(program: Any, tmp_path: Path) -> None:
    """ddp, ZeRO 2 and FSDP2 on two ranks, ZeRO 3 on one: the batches and losses of one process, one line of history."""
    program.run(*DEBUG, tmp_path / "alone", *FLAGS)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 32, "zero_optimization": {"overlap_comm": False}}))
    parts: list[tuple[int, tuple[object, ...]]] = [
        (5, ("--engine", "ddp")),
        (11, (*DEEPSPEED, file, "--parallel.zero-stage", "2", "--train.micro-batch", "8")),
        (17, ("--engine", "fsdp2", "--parallel.reshard", "false", "--train.micro-batch", "8")),
    ]
    for step, engine in parts:
        with program.ranks(2, *DEBUG, tmp_path / "moved", *FLAGS, *engine) as jobs:
            program.until_step(jobs[0], tmp_path / "moved" / "debug", step)
            jobs[0].terminate()
            said = [job.communicate()[1] for job in jobs]
        assert "saved after step" in said[0], said
    program.run(*DEBUG, tmp_path / "moved", *FLAGS, *DEEPSPEED, file, "--parallel.zero-stage", "3")
    found, expected = (program.records(tmp_path / name / "debug") for name in ("moved", "alone"))
    assert [line["step"] for line in found] == list(range(1, 25))
    assert [line["batch_digest"] for line in found] == [line["batch_digest"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["grad_norm"]["total"] == pytest.approx(other["grad_norm"]["total"], rel=5e-2)
    one, other = program.tensors(tmp_path / "moved" / "debug"), program.tensors(tmp_path / "alone" / "debug")
    assert {name: len(content) for name, content in one.items()} == {name: len(c) for name, c in other.items()}
    starts = json.loads((tmp_path / "moved" / "debug" / "environment.json").read_text())
    assert [start["deepspeed"] is not None for start in starts] == [False, True, False, True]
    assert starts[1]["deepspeed"]["train_batch_size"] == 32


class StopAfter(StopRequest):
    """Asked to stop once a step is logged."""

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder, self.step = folder, step
        super().__init__()

    @property
    def received(self) -> str | None:
        log = self.folder / "metrics.jsonl"  # of which every step writes a line
        reached = self.step is not None and log.exists() and log.read_text().count("\n") >= self.step
        return "SIGTERM" if reached else None

    @received.setter
    def received(self, value: str | None) -> None:
        assert value is None


def start(folder: str, flags: list[str], stop_after: int | None = None) -> str:
    """A start of a run inside a rank that is joined already: all of `train` but the joining. How it ended."""
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    run = runfile.load("configs/debug.yaml", ["--folder", folder, *flags])
    with mock.patch.object(train, "join", return_value=nullcontext(world)):
        try:
            train.train(run, StopAfter(run.path, stop_after))
        except (Stopped, UserError) as error:
            return str(error)
    return "finished"


@pytest.mark.parametrize(
    "engine",
    [("--engine", "fsdp2"), ("--engine", "deepspeed", "--parallel.zero-stage", "3", "--train.micro-batch", "4")],
    ids=str,
)
def test_a_stopped_run_goes_on_bit_for_bit(program: Any, ranks: Any, engine: tuple[str, ...], tmp_path: Path) -> None:
    """On the same ranks: the weights, moments and average of a run that was left alone."""
    flags, pool = ["--train.samples", "384", "--optim.ema-decay", "0.9", *engine], ranks(2)
    assert pool.run(start, str(tmp_path / "calm"), flags) == ["finished"] * 2
    for said in pool.run(start, str(tmp_path / "stopped"), flags, 5):
        assert "saved after step 5" in said
    assert pool.run(start, str(tmp_path / "stopped"), flags) == ["finished"] * 2
    assert program.newest(tmp_path / "stopped" / "debug").name == "step_00000012"
    assert program.tensors(tmp_path / "stopped" / "debug") == program.tensors(tmp_path / "calm" / "debug")


def test_broken_weights_end_every_rank_though_one_alone_has_them_whole(ranks: Any, tmp_path: Path) -> None:
    flags = ["--engine", "fsdp2", "--optim.lr", "1e39", "--optim.warmup-samples", "0"]
    for said in ranks(2).run(start, str(tmp_path), flags):
        assert said.startswith("optim.lr 1e+39: "), said
    assert not list((tmp_path / "debug" / "checkpoints").glob("step_*"))


def test_a_file_that_contradicts_the_run_ends_every_rank(ranks: Any, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 32}))
    flags = [*DEEPSPEED, str(file), "--train.global-batch", "64"]
    for said in ranks(2).run(start, str(tmp_path), flags):
        assert "train_batch_size 32 contradicts train.global_batch 64" in said
