"""What is said of a run at every moment of its life, from folders as they then are."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint_files, cli, errors, verbs_runs
from pretrain.checkpoints import places
from pretrain.checkpoints.url import Url
from pretrain.history import lines, saves, status

_spec = importlib.util.spec_from_file_location("history_folders", Path(__file__).parent / "folders.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

RUNNING: dict[str, Any] = {"events": [make.event("start", 0, 0, pids=[1], ranks=1)], "metrics": [make.record(5)]}


def state(run: Path) -> str:
    return status.read(run).life.state


def test_a_run_at_every_moment(tmp_path: Path) -> None:
    attempt = {"attempt": 1, "host": make.beat()["host"], "pid": os.getpid(), "time": make.at(0)}
    begun = make.write(tmp_path / "begun")
    (begun / "attempts").mkdir()
    (begun / "attempts" / "00000001_here_1.json").write_text(json.dumps(attempt))
    assert state(begun) == "starting"
    (begun / "attempts" / "00000001_here_1.json").write_text(json.dumps(attempt | {"pid": make.dead_pid()}))
    assert state(begun) == "dead"
    (begun / "attempts" / "00000001_here_1.json").write_text(json.dumps(attempt)[:20])
    assert state(begun) == "starting"

    ended = {0: "finished", errors.REQUEUE: "stopped", errors.FAILURE: "failed", errors.USER_ERROR: "failed"}
    for code, expected in ended.items():
        beats = [make.beat(0, code=0), make.beat(1, code=code, reason="Some: words")]
        assert state(make.write(tmp_path / f"code{code}", beats=beats, **RUNNING)) == expected, code
    running = make.write(tmp_path / "running", beats=[make.beat()], **RUNNING)
    assert state(running) == "running"
    killed = make.write(tmp_path / "killed", beats=[make.beat(), make.beat(1, pid=make.dead_pid())], **RUNNING)
    found = status.read(killed)
    assert found.life.state == "dead"
    assert "rank 1" in found.life.detail
    assert status.read(tmp_path / "code1").life.detail == "rank 1 ended with exit code 1: Some: words"


def test_a_run_without_a_sign_for_long_is_not_called_dead_from_afar(tmp_path: Path) -> None:
    run = make.write(tmp_path / "far", beats=[make.beat(host="elsewhere")], **RUNNING)
    assert state(run) == "running"
    hour_ago = time.time() - 3600
    os.utime(run / "ranks" / "rank_00000.json", (hour_ago, hour_ago))
    assert state(run) == "silent"


def test_a_standstill_counts_while_nothing_has_moved_since(tmp_path: Path) -> None:
    said = "rank 1 (far, pid 3) is in phase loss since 400 s"
    stall = {"time": make.at(50), "told_by": 0, "ending": False, "behind": [1], "lines": [said]}
    still = [make.beat(0, since=make.at(10)), make.beat(1, since=make.at(9))]
    run = make.write(tmp_path / "run", beats=still, stalls=[stall], **RUNNING)
    found = status.read(run)
    assert (found.life.state, found.life.detail, found.faults) == ("stalled", said, 1)
    make.write(run, beats=[make.beat(1, since=make.at(51))])
    assert state(run) == "running"


def test_half_written_files_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    run = make.write(tmp_path / "run", beats=[make.beat(step=9)], **RUNNING)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(make.record(6)) + "\n" + json.dumps(make.record(7))[:-9])
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 3, "event": "saved"}\nnonsense\n[1]\n{"time": "2026')
    (run / "ranks" / "rank_00001.json").write_text("{")
    (run / "ranks" / "rank_00002.json").write_text('{"rank": 2}')
    found = status.read(run)
    assert (found.progress.loss, found.progress.step, found.steps) == (3.0, 9, (9, 40))
    assert found.progress.left_s == (40 - 9) * make.BATCH / 64
    assert (found.life.ranks, found.restarts, found.faults) == (1, 0, 0)
    (run / "metrics.jsonl").write_text(
        json.dumps(make.record(7) | {"step": "x", "samples": None, "step_s": "y"}) + "\n"
    )
    assert status.read(run).progress.samples_per_s == 64.0
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml"):
        (run / name).write_bytes(b"\xff\xfe" if name != "config.yaml" else b"")
        if name == "config.yaml":
            with pytest.raises(errors.UserError, match=r"config\.yaml"):
                status.read(run)
        else:
            status.read(run)


def test_restarts_with_reasons_lost_steps_and_goodput(tmp_path: Path) -> None:
    events = [
        make.event("start", 0, 0, pids=[1], ranks=1, total_samples=20 * make.BATCH),
        make.event("saved", 5, 5),
        make.event("stopped", 8, 8, signal="SIGTERM"),
        make.event("start", 20, 8, pids=[2], ranks=1),
        make.event("step_skipped", 21, 9, reason="not finite", keys=["a"] * 256),
        make.event("start", 30, 8, pids=[3], ranks=2, before={"step": 12, "reason": "rank 1 left no exit code"}),
        make.event("rewound", 40, 13, to=8, rewinds=1),
        make.event("start", 41, 8, pids=[3], ranks=2, before={"step": 12, "reason": "rank 1 left no exit code"}),
        make.event("start", 60, 10, pids=[4], ranks=2, total_samples=20 * make.BATCH),
    ]
    beats = [make.beat(code=0, time=make.at(100))]
    metrics = [make.record(step, skipped=step) for step in range(2, 21, 2)]
    run = make.write(tmp_path / "run", events=events, metrics=metrics, beats=beats)
    end = make.BEGAN.timestamp() + 100
    os.utime(run / "ranks" / "rank_00000.json", (end, end))
    found = status.read(run)
    told = [(start.step, start.reason, start.lost_steps) for start in found.events.starts]
    assert told[:3] == [(0, None, None), (8, "stopped by SIGTERM", 0), (8, "rank 1 left no exit code", 4)]
    assert told[3:] == [(10, "ended without a word", None)], "going back is no start"
    assert (found.restarts, found.lost_steps) == (3, 4 + 5)
    assert (found.life.state, found.wall_s, found.goodput) == ("finished", 100.0, 20 * 0.5 / 100)
    assert found.samples_per_s == 20 * make.BATCH / 100
    assert found.faults == 1 + 1 + 20
    said = "\n".join(verbs_told(run))
    assert "3, 9 steps lost at least" in said
    assert "20 samples replaced (3.12%)" in said
    assert "1 steps left out" in said


def verbs_told(run: Path) -> list[str]:
    from pretrain.history import told

    return told.one(status.read(run))


def test_training_time_of_long_records_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = [make.record(step, step_s=0.2 + 0.1 * (step % 2)) for step in range(1, 5001)]
    run = make.write(tmp_path / "run", events=RUNNING["events"], metrics=metrics)
    exact = status.read(run).progress.training_s
    assert exact == pytest.approx(1250)
    monkeypatch.setattr(lines, "SMALL", 0)
    assert len(lines.thinned(run / "metrics.jsonl")) <= 2000
    assert status.read(run).progress.training_s == pytest.approx(exact, rel=0.1)


def test_checkpoints_are_what_the_writer_calls_so(tmp_path: Path) -> None:
    assert (saves.COMMIT, saves.MANIFEST) == (checkpoint_files.COMMIT, checkpoint_files.MANIFEST)
    assert places.NAME.pattern.endswith(saves.NAME.pattern)
    run = make.write(tmp_path / "run", **RUNNING)
    assert status.read(run).saves == saves.Saves((), None, None, None)
    for step, commit in ((2, True), (4, True), (6, False)):
        make.checkpoint(run, step, commit)
    (run / "checkpoints" / ".saving_00001_step_00000008").mkdir()
    found = status.read(run).saves
    assert (found.steps, found.bytes, found.problem) == ((2, 4), 5, None)
    weights = run / "checkpoints" / "step_00000004" / "weights" / "model.safetensors"
    weights.write_bytes(b"x")
    assert "has 1 bytes instead of 5" in str(status.read(run).saves.problem)
    weights.unlink()
    found = status.read(run)
    assert "model.safetensors is missing" in str(found.saves.problem)
    assert found.faults == 1


def test_checkpoints_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"name": "run", "checkpoint": {"to": "memory://status"}}
    for step, attempt, commit in ((3, 1, True), (5, 2, True), (7, 2, False)):
        folder = Url(f"memory://status/run/checkpoints/step_{step:08d}.{attempt}")
        (folder / "manifest.json").write(lambda: [b'{"a": {"size": 9}}'])
        if commit:
            (folder / "COMMIT").write(lambda: [b"{}"])
    found = saves.read(tmp_path, config)
    assert (found.steps, found.bytes, found.problem) == ((3, 5), 9, None)
    assert found.newest == "memory://status/run/checkpoints/step_00000005.2"
    refused = saves.read(tmp_path, {"checkpoint": {"to": "nowhere://status"}})
    assert refused.steps == ()
    assert "nowhere://status" in str(refused.problem)
    answer = threading.Event()
    monkeypatch.setattr(Url, "iterdir", lambda self: answer.wait(60) and [])
    assert "has not answered for 0.1 s" in str(saves.read(tmp_path, config, answer_s=0.1).problem)
    answer.set()


def test_one_run_several_runs_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        make.write(tmp_path / name, beats=[make.beat()], **RUNNING)
    (tmp_path / "notes.txt").write_text("")
    everything = [str(path) for path in sorted(tmp_path.iterdir())]
    assert cli.run(["status", *everything]) == errors.DONE
    said = capsys.readouterr()
    assert [line.split()[1] for line in said.out.splitlines()] == ["state", "running", "running"]
    assert "no run has begun in" in said.err
    assert cli.run(["status", *everything, "--json"]) == errors.DONE
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(one["run"]).name for one in told] == ["a", "b"]
    assert {"life", "progress", "saves", "events", "goodput", "restarts", "lost_steps", "faults"} <= set(told[0])
    make.write(tmp_path / "broken", beats=[make.beat()], **RUNNING)
    (tmp_path / "broken" / "config.yaml").write_text("a: [")
    assert cli.run(["status", *everything, str(tmp_path / "broken")]) == errors.DONE
    said = capsys.readouterr()
    assert (len(said.out.splitlines()), "broken/config.yaml: cannot be read" in said.err) == (3, True)
    for folder, word in ((tmp_path, f"name {tmp_path / 'a'}"), (tmp_path / "c", "there is no such folder")):
        assert cli.run(["status", str(folder)]) == errors.USER_ERROR
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert word in err
    assert cli.run(["status"]) == errors.USER_ERROR


def test_watching_looks_again_until_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, waits = make.write(tmp_path / "run", beats=[make.beat()], **RUNNING), []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(verbs_runs, "pause", pause)
    assert cli.run(["status", str(run), "--watch"]) == errors.DONE
    assert cli.run(["status", "--watch", "0.5", str(run)]) == errors.DONE
    assert waits == [10.0] * 3 + [0.5]
    assert capsys.readouterr().out.count("  state ") == 4
    assert cli.run(["status", str(run), "--watch", "0"]) == errors.USER_ERROR


def test_neither_verb_needs_torch(tmp_path: Path) -> None:
    runs = [str(make.write(tmp_path / name, beats=[make.beat()], **RUNNING)) for name in ("a", "b")]
    code = (
        "import sys; from pretrain import cli; "
        f"codes = [cli.run(['status', *{runs}]), cli.run(['status', {runs[0]!r}]), cli.run(['compare', *{runs}])]; "
        "sys.exit(codes != [0, 0, 0] or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
