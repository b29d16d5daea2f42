"""One run through several engines and world sizes, as a user starts it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("tests_training", Path(__file__).parents[1] / "test_training.py")
assert _spec is not None
assert _spec.loader is not None
jobs: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = jobs
_spec.loader.exec_module(jobs)

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
FLAGS = ("--train.samples", 960, "--optim.ema-decay", 0.9, "--log.batch-digest", "true")  # 30 steps


def test_ddp_then_fsdp2_then_one_process(tmp_path: Path) -> None:
    """The batches and losses of a run that one process did alone, and a checkpoint of the same names and shapes."""
    jobs.run(jobs.ALONE, tmp_path / "alone", *FLAGS)
    flags = (*FLAGS, "--train.micro-batch", "8")
    for step, engine in ((8, ("--engine", "ddp")), (18, ("--engine", "fsdp2", "--parallel.reshard", "false"))):
        with jobs.start(jobs.under_torchrun(2), tmp_path / "moved", *flags, *engine) as job:
            jobs.until_step(job, tmp_path / "moved" / "debug", step)
            job.terminate()
            said = job.communicate(timeout=120)[1]
        assert "saved after step" in said, said
    jobs.run(jobs.ALONE, tmp_path / "moved", *FLAGS)
    found, expected = (jobs.records(tmp_path / name / "debug") for name in ("moved", "alone"))
    assert [line["step"] for line in found] == list(range(1, 31))
    assert [line["batch_digest"] for line in found] == [line["batch_digest"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["grad_norm"]["total"] == pytest.approx(other["grad_norm"]["total"], rel=5e-2)
    one, other = jobs.tensors(tmp_path / "moved" / "debug"), jobs.tensors(tmp_path / "alone" / "debug")
    assert {name: len(content) for name, content in one.items()} == {name: len(c) for name, c in other.items()}


def test_fsdp2_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped and started again on the same ranks: the weights, moments and average of a run that was left alone."""
    flags = (*FLAGS, "--engine", "fsdp2")
    jobs.run(jobs.under_torchrun(2), tmp_path / "calm", *flags)
    with jobs.start(jobs.under_torchrun(2), tmp_path / "stopped", *flags) as job:
        jobs.until_step(job, tmp_path / "stopped" / "debug", 13)
        job.terminate()
        job.communicate(timeout=120)
    jobs.run(jobs.under_torchrun(2), tmp_path / "stopped", *flags)
    assert jobs.tensors(tmp_path / "stopped" / "debug") == jobs.tensors(tmp_path / "calm" / "debug")


def test_broken_weights_end_every_rank_though_one_alone_has_them_whole(tmp_path: Path) -> None:
    flags = ("--engine", "fsdp2", "--optim.lr", "1e30", "--optim.warmup-samples", "0")
    said = jobs.run(jobs.under_torchrun(2), tmp_path, *flags, expect=1)
    assert said.count("is not finite after step 10") == 1
    assert not list((tmp_path / "debug" / "checkpoints").glob("step_*"))
