"""Where numbers go: one line of history in files, and trackers that fail without stopping a run."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import Data as DataConfig
from pretrain.config import Log, Run, Train
from pretrain.console import Console, duration
from pretrain.metrics import KEYS
from pretrain.sinks import Jsonl, Sinks, open_sinks
from pretrain.values import Skip
from pretrain.world import World

ONE = World(0, 1, 0, torch.device("cpu"))
OTHER = World(1, 2, 1, torch.device("cpu"))


def a_run(folder: Path, **log: Any) -> Run:
    data = DataConfig(train=("synthetic:1024",))
    return Run(name="mine", folder=str(folder), data=data, train=Train(samples=320, global_batch=32), log=Log(**log))


def record(step: int, **changes: Any) -> dict[str, Any]:
    values = {"step": step, "epoch": 0.1, "samples": step * 32, "loss": 2.5, "terms": {"clip": 2.5}, "lr": 1e-3}
    values |= {"logit_scale": 14.3, "logit_bias": None, "grad_norm": {"total": 1.0, "image": 0.6, "text": 0.8}}
    values |= {"samples_per_s": 64.0, "step_s": 0.5, "data_wait_s": 0.1}
    values |= {"phases_s": {"data": 0.1, "backward": 0.3, "other": 0.1}, "exchange_bytes": 0}
    values |= {"peak_memory_bytes": 10, "skipped": 0, "truncated": 0, "batch_digest": None}
    values |= {"steps_skipped": 0, "rewinds": 0, "geometry": {"image_rank": 3.0}, "weights_hash": None} | changes
    assert tuple(values) == KEYS
    return values


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    sink = Jsonl(tmp_path / "a" / "m.jsonl")
    sink.write(record(1, terms={f"term{n}": float(n) for n in range(2000)}))
    assert lines(tmp_path / "a/m.jsonl") == [record(1, terms={f"term{n}": float(n) for n in range(2000)})]
    sink.close()


def test_lines_are_strict_json_whatever_the_loss(tmp_path: Path) -> None:
    sink = Jsonl(tmp_path / "m.jsonl")
    sink.write(record(1, loss=float("nan"), terms={"clip": float("inf")}))
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert found["loss"] is None
    assert found["terms"] == {"clip": None}


def test_resume_keeps_one_line_of_history(tmp_path: Path, caplog: Any) -> None:
    run = a_run(tmp_path, progress=False)
    with open_sinks(run, ONE, 320) as sinks:
        for step in range(1, 6):
            sinks.write(record(step))
            sinks.skips([Skip(step * 32, "a.tar", f"k{step}", "bad jpeg")])
        sinks.event("started", attempt=1)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    with caplog.at_level(logging.WARNING), open_sinks(run, ONE, 320, step=3, samples=96) as sinks:
        sinks.write(record(4, loss=1.0))
        sinks.event("resumed", step=3)
    assert [(r["step"], r["loss"]) for r in lines(run.path / "metrics.jsonl")] == [
        (1, 2.5),
        (2, 2.5),
        (3, 2.5),
        (4, 1.0),
    ]
    assert [r["index"] for r in lines(run.path / "skips.jsonl")] == [32, 64]
    assert lines(run.path / "skips.jsonl")[0] == {"index": 32, "shard": "a.tar", "key": "k1", "reason": "bad jpeg"}
    assert [r["event"] for r in lines(run.path / "events.jsonl")] == ["started", "resumed"]
    assert "line 6 is not a whole record" in caplog.text


def test_a_fresh_start_in_an_old_folder_begins_a_new_line(tmp_path: Path) -> None:
    run = a_run(tmp_path, progress=False)
    with open_sinks(run, ONE, 320) as sinks:
        sinks.write(record(1))
    with open_sinks(run, ONE, 320):
        pass
    assert lines(run.path / "metrics.jsonl") == []


def test_truncating_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def fail(*args: Any) -> None:
        raise OSError("killed here")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="killed here"):
        Jsonl(path, lambda r: r["step"] < 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_an_earlier_attempt_that_wakes_up_adds_no_line(tmp_path: Path) -> None:
    earlier = Jsonl(tmp_path / "m.jsonl")
    earlier.write(record(1))
    later = Jsonl(tmp_path / "m.jsonl", lambda r: r["step"] <= 1)  # nothing is to be removed
    earlier.write(record(2))
    later.write(record(2, loss=7.0))
    assert lines(tmp_path / "m.jsonl") == [record(1), record(2, loss=7.0)]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    run = a_run(tmp_path, tensorboard=True, wandb="pairs")
    with open_sinks(run, OTHER, 320) as sinks:
        sinks.write(record(1))
        sinks.track({"top1": 0.5}, 32)
        sinks.skips([Skip(1, "a", "b", "c")])
        sinks.event("started")
    assert not run.path.exists()


class Broken:
    def __init__(self, at: str) -> None:
        self.at, self.calls = at, 0

    def write(self, record: Any) -> None:
        self.calls += 1
        if self.at == "write":
            raise ConnectionError("gone")

    def close(self) -> None:
        if self.at == "close":
            raise ConnectionError("gone")


@pytest.mark.parametrize("at", ["write", "close"])
def test_a_failing_tracker_is_reported_once_and_dropped(tmp_path: Path, caplog: Any, at: str) -> None:
    broken, fine = Broken(at), Broken("never")
    sinks = Sinks({"metrics": Jsonl(tmp_path / "m.jsonl")}, [broken, fine])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            sinks.write(record(step))
        sinks.close()
    assert len(caplog.records) == 1
    assert "Broken failed and is off" in caplog.text
    assert broken.calls == (1 if at == "write" else 3)
    assert fine.calls == 3
    assert len(lines(tmp_path / "m.jsonl")) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_raises(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    sink = Jsonl.__new__(Jsonl)
    sink._file = (tmp_path / "m.jsonl").open("a", buffering=1)
    with pytest.raises(OSError, match="No space"):
        Sinks({"metrics": sink}, []).write(record(1))


def test_tracked_numbers_are_no_step_of_the_run(tmp_path: Path) -> None:
    seen: list[Any] = []
    fine = Broken("never")
    fine.write = seen.append  # type: ignore[method-assign]
    console = Console(320, 32, stream=io.StringIO())
    sinks = Sinks({"metrics": Jsonl(tmp_path / "m.jsonl")}, [console, fine])
    sinks.track({"zero_shot": {"top1": 0.5}}, 64)
    sinks.close()
    assert seen == [{"zero_shot": {"top1": 0.5}, "samples": 64}]
    assert lines(tmp_path / "m.jsonl") == []


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_nobody_watches() -> None:
    stream = io.StringIO()
    console = Console(320, 32, stream=stream)
    console.write(record(5))
    console.write(record(6, loss=float("nan"), skipped=3))
    console.close()
    first, second = stream.getvalue().splitlines()
    numbers = "loss 2.5000  lr 1.00e-03  scale 14.30  64 samples/s  data wait 20%  backward 60%  data 20%"
    assert first == f"step 5/10  {numbers}  left 00:00:02"
    assert "loss nan" in second
    assert second.endswith("skipped 3")


@pytest.mark.parametrize(("progress", "live"), [(True, True), (False, False)])
def test_a_bar_on_a_terminal_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, progress: bool, live: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Tty()
    console = Console(320, 32, progress=progress, stream=stream)
    console.write(record(5))
    console.close()
    assert "step 5/10" in stream.getvalue()
    assert "loss 2.5000" in stream.getvalue()
    assert ("\x1b[" in stream.getvalue()) is live


def test_duration() -> None:
    assert duration(3661) == "01:01:01"
    assert duration(90061) == "1d 01:01:01"
    assert duration(None) == duration(float("inf")) == "?"


LEAVE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_sinks import ONE, a_run, open_sinks, record
sinks = open_sinks(a_run(Path(sys.argv[1]), tensorboard=True), ONE, 320)
sinks.write(record(1))
raise KeyError("a run that dies without closing anything")
"""


@pytest.mark.slow
def test_d19_a_crash_ends_the_process(tmp_path: Path) -> None:
    """open_clip's remote sync is a non-daemon process: after a crash the job never ends."""
    command = [sys.executable, "-c", LEAVE, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "KeyError" in done.stderr
    assert len(lines(tmp_path / "mine" / "metrics.jsonl")) == 1
