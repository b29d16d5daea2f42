"""Runs some of whose batches are bad: what is left out, where they go back to, and that a kill changes nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pretrain import cli, train
from pretrain.errors import RunFailed, UserError
from pretrain.guard import guard
from pretrain.world import World

_spec = importlib.util.spec_from_file_location("guard_runs", Path(__file__).with_name("runs.py"))
assert _spec is not None
assert _spec.loader is not None
runs: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = runs
_spec.loader.exec_module(runs)

NAN = math.nan
TROUBLE = dict.fromkeys(range(40, 52), NAN)
"""Batches by number: steps 41 to 52, of which patience 10 sees enough at step 64."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bad batches, which are left out: one not finite, one a spike."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        runs.poison(patch, {10: NAN, 45: 1e3})
        runs.run(runs.a_run(folder, 64, "--optim.ema-decay", 0.9, "--log.batch-digest", "true"))
    return folder


def test_steps_left_out_are_told_with_their_samples(calm: Path) -> None:
    first, second = runs.events(calm, "step_skipped")
    assert (first["step"], first["reason"], first["loss"], first["samples"]) == (
        11,
        "the loss is not finite",
        None,
        [80, 88],
    )
    assert (second["step"], second["reason"], second["samples"]) == (46, "the loss spikes", [360, 368])
    assert second["loss"] > second["max_loss"] > 0
    assert len(second["keys"]) == 8
    assert all("/" in key for key in second["keys"])
    found = {line["step"]: line["steps_skipped"] for line in runs.lines(calm, "metrics.jsonl")}
    assert (found[8], found[12], found[44], found[48], found[64]) == (0, 1, 1, 2, 2)
    assert [line["step"] for line in runs.lines(calm, "metrics.jsonl")] == list(range(4, 65, 4))


def test_the_keys_of_a_large_batch_have_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "KEYS", 3)
    runs.poison(monkeypatch, {2: NAN})
    runs.run(runs.a_run(tmp_path, 16))
    (event,) = runs.events(tmp_path, "step_skipped")
    every = (tmp_path / "debug" / event["all_keys"]).read_text().splitlines()
    assert event["keys"] == every[:3]
    assert len(set(every)) == 8


def test_a_run_killed_after_a_skip_ends_as_if_it_had_not_been(calm: Path, tmp_path: Path) -> None:
    """Limits rest on the window that the checkpoint holds: the second spike is judged by the same numbers."""
    flags = (64, "--optim.ema-decay", 0.9, "--log.batch-digest", "true")
    with pytest.MonkeyPatch.context() as patch:
        runs.poison(patch, {10: NAN, 45: 1e3}, kill_at=43)
        with pytest.raises(runs.Killed):
            runs.run(runs.a_run(tmp_path, *flags))
    with pytest.MonkeyPatch.context() as patch:
        runs.poison(patch, {10: NAN, 45: 1e3})
        runs.run(runs.a_run(tmp_path, *flags))
    assert runs.tensors(tmp_path, 64) == runs.tensors(calm, 64)
    assert set(runs.tensors(calm, 64)) >= {
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "guard.safetensors",
    }
    assert runs.events(tmp_path, "step_skipped")[1]["max_loss"] == runs.events(calm, "step_skipped")[1]["max_loss"]


def test_replay_finds_every_number_again_and_writes_nothing(
    calm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step that was logged and saved, over one that was left out."""
    runs.poison(monkeypatch, {45: 1e3})
    before = {path: path.read_bytes() for path in sorted(calm.rglob("*")) if path.is_file()}
    words = ["train", str(calm / "debug" / "config.yaml"), "--folder", str(calm)]
    assert cli.run([*words, "--replay", "48"]) == 0
    table = capsys.readouterr().out
    assert "step_00000040" in table
    assert table.count(" equal\n") == len(table.splitlines()) - 2 >= 8
    assert "weights_hash" in table
    assert "batch_digest" in table
    assert {path: path.read_bytes() for path in sorted(calm.rglob("*")) if path.is_file()} == before
    assert cli.run([*words, "--replay", "8"]) == 2
    assert "no checkpoint of an earlier step is there, those left are of steps 8, 16" in capsys.readouterr().err
    assert cli.run([*words, "--replay", "50"]) == 2
    assert "name a multiple of log.every_steps" in capsys.readouterr().err
    assert cli.run([*words, "--replay", "x"]) == 2


def test_replay_finds_out_a_number_that_was_computed_wrongly(
    calm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.poison(monkeypatch, {44: 1 + 1e-6})
    assert cli.run(["train", str(calm / "debug" / "config.yaml"), "--folder", str(calm), "--replay", "48"]) == 1
    said = capsys.readouterr()
    assert "weights_hash came out otherwise" in said.err.replace(", weights_hash", "weights_hash")
    assert "DIFFERS" in said.out


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewound")
    with pytest.MonkeyPatch.context() as patch:
        runs.poison(patch, TROUBLE)
        runs.run(runs.a_run(folder, 80, "--log.batch-digest", "true"))
    return folder


def test_a_run_goes_back_and_leaves_the_bad_batches_out(rewound: Path) -> None:
    (event,) = runs.events(rewound, "rewound")
    assert (event["step"], event["to"], event["left_out"]) == (64, 40, [320, 416])
    assert (event["rewinds"], event["all_left_out"]) == (1, [[320, 416]])
    assert event["steps_skipped"] == list(range(41, 53))
    assert event["shards"] == ["synthetic"]
    lines = runs.lines(rewound, "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(4, 81, 4)), "one line of history, to the end"
    assert lines[-1]["steps_skipped"] == 0, "those of the trouble are no part of it"
    trainer = json.loads((rewound / "debug/checkpoints/step_00000080/state/trainer.json").read_text())
    assert trainer["facts"]["guard"] == {"skipped": 0, "recent": [], "rewinds": 1, "left_out": [[320, 416]]}


def test_steps_after_the_run_went_back_are_replayed_without_the_bad_batches(rewound: Path) -> None:
    """The checkpoint of step 40 is from before; a line that a kill has torn is no obstacle."""
    words, path = (
        ["train", str(rewound / "debug/config.yaml"), "--folder", str(rewound)],
        rewound / "debug/metrics.jsonl",
    )
    whole = path.read_text()
    path.write_text(whole + '{"step": 8')
    assert cli.run([*words, "--replay", "48"]) == 0
    assert cli.run([*words, "--replay", "44"]) == 0, "of which metrics.jsonl alone knows"
    path.write_text(whole)


def test_the_run_that_went_back_is_the_one_that_never_had_them(rewound: Path, tmp_path: Path) -> None:
    """Killed after it went back and before it saved: the same weights in the end.

    Nothing but the checkpoint that it goes back to is kept beside the newest one.
    """
    flags = (80, "--log.batch-digest", "true", "--checkpoint.keep-last", 1)
    with pytest.MonkeyPatch.context() as patch:
        runs.poison(patch, TROUBLE)
        once = _kill_after_going_back(patch, 46)
        with pytest.raises(runs.Killed):
            runs.run(runs.a_run(tmp_path, *flags))
        assert once
    with pytest.MonkeyPatch.context() as patch:
        runs.poison(patch, TROUBLE)
        runs.run(runs.a_run(tmp_path, *flags, "--log.every-steps", 1))
    assert runs.tensors(tmp_path, 80) == runs.tensors(rewound, 80)
    digests = {line["step"]: line["batch_digest"] for line in runs.lines(rewound, "metrics.jsonl")}
    found = {line["step"]: line["batch_digest"] for line in runs.lines(tmp_path, "metrics.jsonl")}
    assert digests == {step: found[step] for step in digests}


def _kill_after_going_back(patch: pytest.MonkeyPatch, step: int) -> list[int]:
    """End the run before a step that it does for the second time."""
    original, seen = train.Training.forward_backward, []

    def counted(training: Any, batch: Any) -> Any:
        if training.step + 1 == step and training.guard.record.rewinds:
            seen.append(step)
            training.saver.wait()
            raise runs.Killed
        return original(training, batch)

    patch.setattr(train.Training, "forward_backward", counted)
    return seen


def test_a_run_that_cannot_be_saved_by_going_back_ends_with_one_line(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        runs.poison(patch, dict.fromkeys(range(20, 500), NAN))
        with pytest.raises(RunFailed, match=r"guard.rewinds 1: by step 32 .* it has gone back 1 times.*160 to 256"):
            runs.run(runs.a_run(tmp_path, 80, "--guard.rewinds", 1))
    assert len(runs.events(tmp_path, "rewound")) == 1


def test_trouble_before_the_first_checkpoint_has_nowhere_to_go_back_to(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        runs.poison(patch, dict.fromkeys(range(2, 500), NAN))
        with pytest.raises(UserError, match=r"optim.lr 0.0001: by step 32 .* no checkpoint of an earlier step"):
            runs.run(runs.a_run(tmp_path, 64))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line: whatever the guard has missed."""
    original = train.Training.advance

    def broken(training: Any, batch: Any) -> Any:
        outcome = original(training, batch)
        if training.step == 16:
            next(training.model.towers.parameters()).data.view(-1)[0] = NAN
        return outcome

    monkeypatch.setattr(train.Training, "advance", broken)
    with pytest.raises(
        UserError, match=r"is not finite after step 16, and was not saved over the last good checkpoint"
    ):
        runs.run(runs.a_run(tmp_path, 24))
    assert [path.name for path in (tmp_path / "debug" / "checkpoints").glob("step_*")] == ["step_00000008"]


def on_rank(folder: str, engine: str) -> None:
    """The run of `rewound`, shorter, inside a rank that is joined already; one rank's part of the batches is bad."""
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    joined = mock.patch.object(train, "join", return_value=nullcontext(world))
    with pytest.MonkeyPatch.context() as patch, joined:
        runs.poison(patch, dict.fromkeys(range(18, 30), NAN) if world.rank else {})
        runs.run(
            runs.a_run(Path(folder), 40, "--engine", engine, "--log.batch-digest", "true", "--guard.compare-steps", 8)
        )


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_go_back_together_where_one_has_bad_batches(ranks: Any, engine: str, tmp_path: Path) -> None:
    ranks(2).run(on_rank, str(tmp_path), engine)
    (event,) = runs.events(tmp_path, "rewound")
    assert (event["step"], event["to"], event["left_out"]) == (32, 16, [144, 240])
    skipped = runs.events(tmp_path, "step_skipped")
    assert [found["step"] for found in skipped] == list(range(19, 31))
    assert all(len(set(found["keys"])) == 8 for found in skipped), "of both ranks"
    lines = runs.lines(tmp_path, "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(4, 41, 4))
    assert [bool(line["weights_hash"]) for line in lines] == [False, True] * 5
    assert len({line["batch_digest"] for line in lines}) == 10
