"""A run that was killed and went on, beside one that was left alone: what the verbs and the start say of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pretrain import cli, engines, errors, exchange, named
from pretrain.exchange import Exchange
from pretrain.history import compare, status
from pretrain.summary import Summary, _file_of

_spec = importlib.util.spec_from_file_location("history_folders", Path(__file__).parent / "folders.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

FLAGS = ("--train.samples", "384", "--checkpoint.every-steps", "4", "--log.batch-digest", "true")


def train(folder: Path, *flags: str) -> Path:
    assert cli.run(["train", "configs/debug.yaml", "--folder", str(folder), *FLAGS, *flags]) == errors.DONE
    return folder / "debug"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """One that was left alone, a copy that was killed after step 11 and went on from 8, and one with other knobs."""
    calm = train(tmp_path_factory.mktemp("calm"))
    _earlier(calm / "events.jsonl", seconds=5)
    killed = tmp_path_factory.mktemp("killed") / "debug"
    shutil.copytree(calm, killed)
    shutil.rmtree(killed / "checkpoints" / "step_00000012")
    beat = killed / "ranks" / "rank_00000.json"
    facts = json.loads(beat.read_text()) | {"step": 11, "code": None, "pid": make.dead_pid()}
    beat.write_text(json.dumps(facts))
    assert status.read(killed).life.state == "dead"
    train(killed.parent)
    other = train(tmp_path_factory.mktemp("other"), "--seed", "1", "--optim.lr", "2e-3", "--log.every-steps", "2")
    return calm, killed, other


def _earlier(events: Path, seconds: int) -> None:
    """Records have whole seconds, and the run may take less than one: its start is said to have been before."""
    first, *others = events.read_text().splitlines()
    facts = json.loads(first)
    facts["time"] = (datetime.fromisoformat(facts["time"]) - timedelta(seconds=seconds)).isoformat()
    events.write_text("\n".join([json.dumps(facts), *others]) + "\n")


@pytest.mark.slow
def test_a_run_that_was_killed_and_went_on(runs: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    calm, killed, _ = (status.read(run) for run in runs)
    assert (calm.life.state, calm.steps, calm.restarts, calm.faults) == ("finished", (12, 12), 0, 0)
    assert calm.goodput is not None
    assert 0 < calm.goodput <= 1
    (first, second) = killed.events.starts
    assert (first.step, second.step, second.lost_steps, killed.lost_steps) == (0, 8, 3, 3)
    assert second.reason == "rank 0 left no exit code: killed, or the machine is gone"
    assert (second.facts["engine"], second.facts["exchange"], second.facts["total_samples"]) == ("single", "local", 384)
    assert killed.saves.steps == (4, 8, 12)
    assert killed.saves.bytes == pytest.approx(calm.saves.bytes, rel=1e-3)
    assert cli.run(["status", str(runs[1])]) == errors.DONE
    said = capsys.readouterr().out
    assert "finished; 1 rank on" in said
    assert "(cpu, single, local)" in said
    assert "step 12 of 12, 384 samples of 384 (100.0%)" in said
    assert "1, 3 steps lost" in said


@pytest.mark.slow
def test_going_on_gives_the_same_curve_and_other_knobs_another(runs: tuple[Path, Path, Path]) -> None:
    found = compare.compare(runs)
    same, different = found["losses"]["against_first"]
    assert (same["points"], same["max_abs"]) == (12, 0.0)
    assert found["losses"]["batches"][0] == {"compared": 12, "same": 12, "first_difference": None}
    assert (different["points"], found["losses"]["batches"][1]["same"]) == (6, 0)
    assert different["mean_abs"] > 0
    knobs = {row["knob"]: (row["values"], row["is_default"]) for row in found["knobs"]}
    assert knobs == {
        "seed": ([0, 0, 1], [True, True, False]),
        "optim.lr": ([0.001, 0.001, 0.002], [False] * 3),
        "log.every_steps": ([1, 1, 2], [False] * 3),
    }
    assert all(one["samples_per_s_of_a_rank"] == one["samples_per_s"] > 0 for one in found["speed"])
    assert set(found["speed"][0]["phases_s"]) >= {"data", "backward", "other"}


@pytest.mark.slow
def test_a_start_says_what_it_is_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pretrain.summary"):
        run = train(tmp_path, "--train.micro-batch", "8", "--checkpoint.to", "memory://said", "--train.samples", "70")
    (line,) = [record.message for record in caplog.records if record.name == "pretrain.summary"]
    assert line == (
        "1 rank on 1 node (cpu), single, local; batch 32 = 1 rank x 32 (4 x 8 a forward); "
        f"96 samples = 3 steps, from step 0; writes to {run}, checkpoints to memory://said/debug"
    )
    assert status.read(run).saves.newest == "memory://said/debug/checkpoints/step_00000003.1"


def test_the_line_of_many_ranks() -> None:
    found = Summary(8, 2, "H100", "ddp", "gather", 4096, 256, 4096 * 244, 120, "runs/x", None)
    assert found.line == (
        "8 ranks on 2 nodes (H100), ddp, gather; batch 4096 = 8 ranks x 512 (2 x 256 a forward); "
        "999,424 samples = 244 steps, from step 120; writes to runs/x"
    )


def test_methods_are_told_by_the_names_that_a_config_gives_them() -> None:
    for name in exchange.names():
        kind: type[Exchange] = named.find(exchange, name, Exchange)
        assert _file_of(object.__new__(kind)) == name
    for name in ("single", "ddp", "fsdp2"):
        engine = engines.find(name, 2)
        assert isinstance(engine, type)
        assert _file_of(object.__new__(engine)) == name
