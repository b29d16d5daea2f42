"""`--profile`: which steps are recorded, what is written, what is refused."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import verbs
from pretrain.errors import UserError
from pretrain.phases import phase
from pretrain.profiling.memory import Allocation, Range, Use, by_phase
from pretrain.profiling.recorder import Recorder
from pretrain.profiling.timer import STEP
from pretrain.profiling.window import Window, take_from
from pretrain.world import World

ROOT = Path(__file__).resolve().parents[2]
SECOND = World(1, 2, 1, torch.device("cpu"))
BLOCK = 4 << 20


def steps(count: int) -> Iterator[int]:
    for n in range(count):
        with phase("data"):
            held = torch.zeros(BLOCK // 4)
        yield n
        del held


def loop(recorder: Recorder, count: int, stop_at: int | None = None) -> list[int]:
    seen = []
    for n in recorder.over(steps(count)):
        with phase("backward"):
            weights = torch.ones(64, requires_grad=True)
            with phase("exchange", "all_gather"):
                torch.autograd.backward(weights.exp().sum())
        seen.append(n)
        if n + 1 == stop_at:
            break
    return seen


def ranges(folder: Path, rank: int = 1) -> list[str]:
    events = json.loads(gzip.decompress((folder / f"trace_rank{rank:05d}.json.gz").read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


@pytest.mark.parametrize(("first", "last"), [(1, 1), (2, 3), (3, 5)])
def test_the_steps_asked_for_and_no_others(tmp_path: Path, first: int, last: int) -> None:
    assert loop(Recorder(Window(first, last), tmp_path, SECOND, steps_left=5), 5) == [0, 1, 2, 3, 4]
    names = ranges(tmp_path)
    count = last - first + 1
    assert {name: names.count(name) for name in ("phase data", "phase backward", "phase exchange")} == {
        "phase data": count,
        "phase backward": count,
        "phase exchange": count,
    }
    summary = (tmp_path / "summary_rank00001.txt").read_text()
    assert summary.startswith(f"{count} steps from {first}..{last} of this start, rank 1 of 2\n")
    assert all(f"  {name} " in summary for name in STEP)
    assert "aten::exp" in summary
    memory = json.loads((tmp_path / "memory_rank00001.json").read_text())
    assert BLOCK <= memory["data"]["peak_bytes"] < 1.1 * BLOCK
    assert memory["backward"]["peak_bytes"] > BLOCK


def test_a_run_that_stops_within_the_window_leaves_what_was_recorded(tmp_path: Path) -> None:
    assert loop(Recorder(Window(2, 5), tmp_path, SECOND, steps_left=5), 5, stop_at=4) == [0, 1, 2, 3]
    assert ranges(tmp_path).count("phase backward") == 3
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_run_that_goes_back_counts_on_and_records_once(tmp_path: Path) -> None:
    recorder = Recorder(Window(3, 6), tmp_path, SECOND, steps_left=9)
    loop(recorder, 9, stop_at=2)  # left within step 2, the warm-up, which is done again
    loop(recorder, 9, stop_at=4)  # left within step 5
    assert ranges(tmp_path).count("phase backward") == 3
    before = (tmp_path / "summary_rank00001.txt").read_bytes()
    assert loop(recorder, 5) == [0, 1, 2, 3, 4]
    assert (tmp_path / "summary_rank00001.txt").read_bytes() == before


def test_without_a_window_nothing_is_written(tmp_path: Path) -> None:
    assert loop(Recorder(None, tmp_path / "profile", SECOND, steps_left=5), 3) == [0, 1, 2]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_of_and_training_goes_on(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "profile").write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        assert len(loop(Recorder(Window(1, 2), tmp_path / "profile", SECOND, steps_left=5), 5)) == 5
    assert "the profile of rank 1 could not be written" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10", "--profile 10: give the first and the last step of this start, as in --profile 10..12"),
        ("a..b", "give the first and the last step"),
        ("-1..3", "give the first and the last step"),
        ("0..3", "--profile 0..3: steps count from 1"),
        ("5..4", "the first comes before the last"),
        ("1..101", "101 steps make a trace no viewer opens; take at most 100"),
    ],
)
def test_bad_ranges_are_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")) as error:
        take_from(["a.yaml", "--profile", text])
    assert "\n" not in str(error.value)


def test_steps_that_a_start_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--profile 4\.\.6: this start has 5 steps to go; name some of those"):
        Recorder(Window(4, 6), tmp_path, SECOND, steps_left=5)
    with pytest.raises(UserError, match=r"--profile 1\.\.1: this start has 0 steps to go; the run has seen all"):
        Recorder(Window(1, 1), tmp_path, SECOND, steps_left=0)


def test_the_flag_is_taken_out_of_a_command_line() -> None:
    assert take_from(["a.yaml", "--profile", "10..12", "--name", "x"]) == (Window(10, 12), ["a.yaml", "--name", "x"])
    assert take_from(["--profile=1..1"]) == (Window(1, 1), [])
    assert take_from(["--name", "x"]) == (None, ["--name", "x"])
    with pytest.raises(UserError, match="--profile without steps"):
        take_from(["a.yaml", "--profile"])


def test_memory_belongs_to_the_innermost_phase() -> None:
    outer, inner = Range("loss", 10, 50), Range("exchange", 20, 30)
    sizes = {5: 1, 12: 10, 22: 100, 28: -100, 40: -5, 60: -6}
    allocations = [Allocation(at, size) for at, size in sizes.items()]
    assert by_phase(allocations, [inner, outer], held=1000) == {
        "other": Use(1001, -5),
        "loss": Use(1011, 5),
        "exchange": Use(1111, 0),
    }


@pytest.mark.slow
def test_a_run_is_profiled_and_its_records_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flags = ["--folder", str(tmp_path), "--train.samples", "192", "--log.every-steps", "2"]
    verbs.train(["configs/debug.yaml", *flags, "--profile", "3..4"])
    folder = tmp_path / "debug" / "profile"
    names = ranges(folder, rank=0)
    assert all(names.count(f"phase {name}") == 2 for name in ("text_tower", "image_tower", "backward", "optimizer"))
    for line in (tmp_path / "debug" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert sum(record["phases_s"].values()) == pytest.approx(record["step_s"])
        assert all(record["phases_s"][name] > 0 for name in ("data", "image_tower", "backward", "optimizer", "other"))


def test_what_was_allocated_before_the_profile_hides_nothing_when_it_is_released() -> None:
    found = by_phase([Allocation(1, -100), Allocation(5, 40)], [Range("data", 4, 6)])
    assert found["data"].peak_bytes == 40
