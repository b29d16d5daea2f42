"""Differences between runs: knobs, losses, batches, speed, results; from records written by hand."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain import cli, errors
from pretrain.history import compare, curve, knobs
from pretrain.history.losses import losses

_spec = importlib.util.spec_from_file_location("history_folders", Path(__file__).parent / "folders.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


def read(path: Path, *records: Any) -> curve.Curve:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in records))
    return curve.read(path)


def test_later_lines_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    steps = [(1, 4.0), (2, 3.0), (3, 2.0), (2, 2.5), (3, None), (4, 1.5)]
    found = read(tmp_path / "m", *(make.record(step, loss=loss) for step, loss in steps), "torn", '{"step": 9}')
    assert (found.samples / make.BATCH).tolist() == [1, 2, 3, 4]
    assert found.loss[[0, 1, 3]].tolist() == [4.0, 2.5, 1.5]
    assert math.isnan(found.loss[2])
    assert found.final == 1.5
    assert len(curve.read(tmp_path / "none")) == 0


def test_every_record_is_read_the_fast_way_or_as_json_alike(tmp_path: Path) -> None:
    record = make.record(3, loss=2.25, batch_digest="abc", terms={"clip": 1.0, "b": 1.25}, logit_bias=-9.5)
    assert curve._PLAIN.match(json.dumps(record).encode()), "the fast way reads what a run writes"
    shuffled = json.dumps(dict(reversed(record.items())))
    assert curve._PLAIN.match(shuffled.encode()) is None
    fast, slow = read(tmp_path / "a", record), read(tmp_path / "b", shuffled)
    assert (fast.samples, fast.loss, fast.digests) == (slow.samples, slow.loss, slow.digests)
    assert fast.digests[0] != 0


def test_losses_at_the_same_samples(tmp_path: Path) -> None:
    one = read(tmp_path / "a", *(make.record(n, loss=4 - n / 10, batch_digest=f"d{n}") for n in range(1, 21)))
    other = read(tmp_path / "b", *(make.record(n, loss=4.5 - n / 10, batch_digest=f"d{min(n, 15)}")
                                   for n in range(5, 31, 5)))  # fmt: skip
    found = losses([one, other, one])
    (apart, same), (batches, _) = found["against_first"], found["batches"]
    assert (apart["points"], apart["interpolated"], apart["max_at"]) == (4, False, 5 * make.BATCH)
    assert apart["mean_abs"] == pytest.approx(0.5)
    assert apart["mean"] == pytest.approx(0.5)
    assert (same["points"], same["max_abs"]) == (20, 0.0)
    assert batches == {"compared": 4, "same": 3, "first_difference": 20 * make.BATCH}
    assert [row["samples"] // make.BATCH for row in found["at"]] == [5, 10, 15, 20]
    assert found["at"][0]["loss"] == pytest.approx([3.5, 4.0, 3.5])
    assert [end["samples"] for end in found["final"]] == [20 * make.BATCH, 30 * make.BATCH, 20 * make.BATCH]


def test_losses_between_logged_steps_and_none(tmp_path: Path) -> None:
    even = read(tmp_path / "a", *(make.record(n, loss=float(n)) for n in range(2, 11, 2)))
    odd = read(tmp_path / "b", *(make.record(n, loss=n + 1.0) for n in range(3, 8, 2)))
    (apart,) = losses([even, odd])["against_first"]
    assert (apart["points"], apart["interpolated"]) == (2, True), "4 and 6 lie between 3 and 7"
    assert apart["mean_abs"] == pytest.approx(1.0)
    found = losses([even, read(tmp_path / "c")])
    assert found["at"] == []
    assert found["against_first"][0]["points"] == 0
    late = read(tmp_path / "d", make.record(99))
    assert losses([even, late])["at"] == []
    unfinished = read(tmp_path / "e", make.record(2, loss=None))
    assert losses([even, unfinished])["against_first"][0]["points"] == 0


def test_only_knobs_that_differ_and_their_defaults() -> None:
    one = {
        "name": "a",
        "seed": 0,
        "objective": [{"name": "clip", "weight": 1.0}],
        "optim": {"lr": 5e-4, "betas": [0.9, 0.98]},
    }
    other = {
        "name": "b",
        "seed": 0,
        "objective": [{"name": "clip", "weight": 0.5}],
        "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
    }
    other |= {"engine": "ddp", "log": {"new_one": 3}}
    found = {row["knob"]: (row["values"], row["is_default"]) for row in knobs.differing([one, other])}
    assert found == {
        "objective.clip.weight": ([1.0, 0.5], [True, False]),
        "optim.lr": ([5e-4, 1e-3], [True, False]),
        "optim.betas": ([[0.9, 0.98], [0.9, 0.95]], [True, False]),
        "engine": ([knobs.ABSENT, "ddp"], [False, False]),
        "log.new_one": ([knobs.ABSENT, 3], [False, False]),
    }
    assert knobs.differing([one, one]) == []
    siglip = one | {"objective": [{"name": "siglip"}]}
    assert [row["knob"] for row in knobs.differing([one, siglip])] == ["objective", "objective.clip.weight"]


def start_of(run: Path, versions: dict[str, str], commit: str, **variables: str) -> None:
    git = {"commit": commit, "diff": "one line"}
    first, last = {"versions": {"torch": "0"}}, {"versions": versions, "git": git, "variables": variables, "host": "h"}
    (run / "environment.json").write_text(json.dumps([first, last]))


def test_the_whole_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "x" / "same", tmp_path / "y" / "same"]
    for n, run in enumerate(runs):
        event = make.event("start", 0, 0, pids=[1], ranks=1 + n, engine=("single", "ddp")[n])
        speed = {"samples_per_s": 64.0 * (1 + n), "phases_s": {"data": 0.1, f"part{n}": 0.2}}
        make.write(run, events=[event], metrics=[make.record(step, **speed) for step in range(1, 9)])
        start_of(run, {"torch": f"2.{n}", "timm": "1"}, "abc", NCCL_DEBUG="info"[: 4 - n], MASTER_PORT=str(n))
        (run / "eval").mkdir()
        for step in (4, 8):
            result = {
                "task": "zero_shot",
                "step": step,
                "average": False,
                "top1": 0.5 + n / 10 + step / 100,
                "data": [],
            }
            (run / "eval" / f"zero_shot_{step:08d}.json").write_text(json.dumps(result))
    (runs[1] / "eval" / "zero_shot_00000008_plain.json").write_text('{"task": "zero_shot", "step": 8, "top1": 0.1}')
    (runs[1] / "eval" / "zero_shot_00000009.json").write_text('{"task": ')
    assert cli.run(["compare", *map(str, runs), "--json"]) == errors.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["knobs"] == []
    differ = {row["fact"]: row["values"] for row in found["environment"]}
    assert differ == {"version torch": ["2.0", "2.1"], "$NCCL_DEBUG": ["info", "inf"], "ranks": [1, 2],
                      "engine": ["single", "ddp"]}  # fmt: skip
    assert [one["samples_per_s_of_a_rank"] for one in found["speed"]] == [64.0, 64.0]
    assert found["speed"][1]["phases_s"] == {"data": 0.1, "part1": 0.2}
    assert found["speed"][0]["peak_memory_bytes"] == 2**30
    results = {(row["task"], row["metric"]): (row["steps"], row["values"]) for row in found["evaluations"]}
    assert results["zero_shot", "top1"] == ([8, 8], pytest.approx([0.58, 0.68]))
    assert results["zero_shot (plain)", "top1"] == ([None, 8], [None, 0.1])
    assert cli.run(["compare", *map(str, runs)]) == errors.DONE
    said = capsys.readouterr().out
    for words in ("x/same", "knobs: no difference", "losses equal at all 8 points", "version torch", "0.5800 (step 8)"):
        assert words in said


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make.write(tmp_path / "run", metrics=[make.record(1)])
    for words in ([str(run)], [], [str(run), str(tmp_path)]):
        assert cli.run(["compare", *words]) == errors.USER_ERROR
        assert capsys.readouterr().err.count("\n") == 1
    bare = make.write(tmp_path / "bare", events=[make.event("start", 0, 0)])
    assert compare.compare([run, bare])["speed"][1]["samples_per_s"] is None
    assert cli.run(["compare", str(run), str(bare)]) == errors.DONE
