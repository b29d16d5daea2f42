"""Who is named as the one that others wait for, from heartbeats alone; and what a rank says of itself."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pretrain import errors, phases
from pretrain.watch import beats, stall
from pretrain.watch.beats import Beat
from pretrain.watch.signs import Signs

ROOT = Path(__file__).resolve().parents[2]
NOW = "2026-01-01T00:05:20.000+00:00"
WAITS = Beat(
    rank=0, host="elsewhere", pid=1, attempt=0, step=812, phase="backward", detail="", time=NOW,
    since="2026-01-01T00:00:00.000+00:00", calls=4021, call="all_gather of exchange", entered=1,
)  # fmt: skip


def beat(rank: int, **changed: Any) -> Beat:
    return dataclasses.replace(WAITS, rank=rank, **changed)


def told(*found: Beat, size: int = 4) -> stall.Stall:
    return stall.find(found, size, NOW)


def test_a_rank_that_never_came_to_a_collective() -> None:
    late = beat(3, phase="loss", calls=4020, entered=2)
    found = told(*(beat(rank) for rank in range(3)), late)
    assert found.lines == (
        "rank 3 (elsewhere, pid 1) is in phase loss since 320 s at step 812, and never entered collective no. 4021, "
        "all_gather of exchange, in which 3 ranks wait",
    )
    assert (found.behind, found.writer) == ((3,), 0)


def test_a_rank_that_never_came_to_a_phase_between_collectives() -> None:
    found = told(beat(0, phase="image_tower", entered=0), beat(1), size=2)
    assert found.lines[0].endswith("step 812, and has not come to phase backward of step 812, in which 1 rank waits")
    assert (found.behind, found.writer) == ((0,), 1), "rank 0 may be the stuck one"


def test_ranks_that_are_a_step_behind() -> None:
    found = told(beat(0), beat(1, step=811, calls=4019), beat(2, step=811, calls=4019), beat(3))
    assert found.behind == (1, 2)


def test_all_at_the_same_point() -> None:
    found = told(*(beat(rank) for rank in range(4)))
    assert found.lines == (
        "all 4 ranks are in phase backward since 320 s at step 812: a network, disk or device that does not answer",
    )
    assert (found.behind, found.writer) == ((), 0)


def test_ranks_that_are_lost_are_named_and_nobody_else() -> None:
    here, me = socket.gethostname(), os.getpid()
    found = told(
        beat(0, host=here, pid=2**22 + 1, step=811),
        beat(1, age_s=beats.SILENT_S + 1),
        beat(2, code=85, reason="SIGTERM came"),
        beat(4, host=here, pid=me),
        size=5,
    )
    assert (found.behind, found.writer) == ((0, 1, 2, 3), 4)
    missing, gone, silent, ended = found.lines
    assert missing == "rank 3 has given no sign at all in this start"
    assert "is gone: no process has its number, and it left no exit code; it was in phase backward at step 811" in gone
    assert ", and has not come to phase backward of step 812, in which 1 rank waits" in gone
    assert silent == f"rank 1 (elsewhere, pid 1) gives no sign since {NOW}; it was in phase backward at step 812"
    assert "has ended with exit code 85: SIGTERM came" in ended


def test_a_thousand_ranks_make_a_short_report() -> None:
    found = told(*(beat(rank, step=811) for rank in range(999)), beat(999), size=1000)
    assert len(found.lines) == stall.NAMED + 1
    assert found.lines[-1] == "and 991 more ranks"
    assert (len(found.behind), found.writer) == (999, 999)


def test_a_beat_is_replaced_whole_and_the_start_before_is_kept(tmp_path: Path) -> None:
    folder = beats.open_folder(tmp_path)
    beats.write(folder, beat(1))
    beats.write(folder, beat(0))
    beats.write(folder, beat(1, step=813))
    assert [(found.rank, found.step) for found in beats.read(folder)] == [(0, 812), (1, 813)]
    os.utime(folder / "rank_00000.json", (1.0, 1.0))
    assert beats.read(folder)[0].age_s > 1e6
    assert sorted(path.name for path in folder.iterdir()) == ["collectives", "rank_00000.json", "rank_00001.json"]
    assert beats.read(beats.open_folder(tmp_path)) == []
    assert len(beats.read(tmp_path / beats.BEFORE)) == 2


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_signs_count_collectives_alike_on_ranks_with_other_threads() -> None:
    clock = Clock()
    signs = Signs(clock)

    def elsewhere(name: str) -> None:
        def enter() -> None:
            with phases.phase(name, "all_reduce"):
                assert signs.background is not None
                assert signs.background.name == name

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    with phases.listening(signs):
        with phases.phase("agreeing", "all_reduce"):
            assert str(signs.at) == "agreeing (all_reduce)"
        with phases.phase("backward"):
            assert (signs.calls, signs.entered) == (1, 1)
            elsewhere("exchange")  # autograd's
            assert (signs.calls, signs.entered, signs.call) == (2, 0, "all_reduce of exchange")
            clock.now = 5.0
            elsewhere("agreeing")  # of a checkpoint's writer
            assert (signs.calls, signs.still_s(), signs.background) == (2, 5.0, None)
        with phases.phase("start"):
            clock.now = 9.0
            elsewhere("start")  # a shard is indexed
            assert (signs.at.name, signs.still_s()) == ("start", 0.0)
        clock.now = 11.0
        signs.forgive(1.5)
        assert (signs.at.name, signs.still_s()) == ("between phases", 0.5)


@pytest.mark.parametrize(("variables", "count"), [({}, 0), ({"SLURM_RESTART_COUNT": "2"}, 2)])
def test_attempts(variables: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert beats.attempt() == count


HUNG = """
import os, sys, time
from pathlib import Path
import torch
from pretrain import errors, phases
from pretrain.watch import watcher
from pretrain.world import World

watcher.END_S = 1.0
folder, ends = Path(sys.argv[1]), sys.argv[2] == "ends"
with watcher.Watch(0, 1, 1.0, folder / "traces") as watch:
    watch.open(folder, World(0, 1, 0, torch.device("cpu")))
    for name in (".rank_00000.json", "rank_00000.stack"):
        (folder / "ranks" / name).unlink(missing_ok=True)
        os.mkfifo(folder / "ranks" / name)
    time.sleep(0.5)
    if ends:
        raise errors.Stopped("saved")
    with phases.phase("loss"):
        time.sleep(600)
"""
"""A rank whose run folder answers no more: nobody reads from these pipes, so opening them waits for ever."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("stands", errors.FAILURE, "pretrain: rank 0 stands still in phase loss, and so do its reports: ended after"),
        ("ends", errors.REQUEUE, "pretrain: rank 0 did not end, after Stopped: saved: ended after 1 s more"),
    ],
)
def test_a_disk_that_does_not_answer_keeps_no_rank(tmp_path: Path, how: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", HUNG, str(tmp_path), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
