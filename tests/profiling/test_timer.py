"""Seconds of phases: inner ones, other threads, clocks whose readings are known later, means over ranks."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from pretrain.metrics import Meter
from pretrain.phases import listening, phase
from pretrain.profiling.timer import STEP, DeviceMarks, Timer, WallMarks, timer
from pretrain.values import GradNorms, StepReport
from pretrain.world import World


class Time:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def spent(found: dict[str, float]) -> dict[str, float]:
    assert tuple(found) == STEP
    return {name: seconds for name, seconds in found.items() if seconds}


def test_an_inner_phase_is_not_the_outer_ones() -> None:
    now = Time()
    timed = Timer(WallMarks(now))
    with listening(timed):
        now.at += 50.0  # in no phase
        with phase("loss"):
            now.at += 1.0
            with phase("exchange", "all_gather"):
                now.at += 2.0
            now.at += 4.0
            with phase("agreeing"):  # has a name, but none that is told of
                now.at += 8.0
        with phase("loss"):
            now.at += 16.0
    assert spent(timed.take()) == {"loss": 21.0, "exchange": 2.0}
    assert spent(timed.take()) == {}


def test_what_is_no_part_of_a_step_counts_for_nothing() -> None:
    now = Time()
    timed = Timer(WallMarks(now))
    with listening(timed):
        for outside in ("evaluating", "staging", "writing"):
            with phase(outside), phase("text_tower"):
                now.at += 1.0
    assert spent(timed.take()) == {}


def test_a_phase_that_is_open_at_a_look_is_split_there() -> None:
    now = Time()
    timed = Timer(WallMarks(now))
    with listening(timed), phase("backward"):
        now.at += 1.0
        assert spent(timed.take()) == {"backward": 1.0}
        now.at += 2.0
    assert spent(timed.take()) == {"backward": 2.0}


def test_a_phase_is_left_by_the_listeners_that_heard_it_begin() -> None:
    now = Time()
    early, late = Timer(WallMarks(now)), Timer(WallMarks(now))
    with listening(early), phase("data"):
        now.at += 1.0
        with listening(late):
            now.at += 2.0
            with phase("exchange"):
                now.at += 4.0
    assert spent(early.take()) == {"data": 3.0, "exchange": 4.0}
    assert spent(late.take()) == {"exchange": 4.0}


class Steps:
    """Two threads that take turns, and the clock that moves with them."""

    def __init__(self) -> None:
        self.now = Time()
        self.timed = Timer(WallMarks(self.now))
        self.go, self.done = threading.Event(), threading.Event()

    def other(self, name: str) -> threading.Thread:
        def work() -> None:
            with phase(name):
                self.now.at += 2.0
                self.done.set()
                self.go.wait(30)

        return threading.Thread(target=work)

    def run(self, name: str) -> dict[str, float]:
        """A backward pass of 1 s alone, 2 s beside another thread's phase, and 4 s with that phase still open."""
        with listening(self.timed):
            thread = self.other(name)
            with phase("backward"):
                self.now.at += 1.0
                thread.start()
                assert self.done.wait(30)
            self.now.at += 4.0
            with phase("optimizer"):
                self.now.at += 8.0
            self.go.set()
            thread.join(30)
            with phase("optimizer"):
                self.now.at += 16.0
        return spent(self.timed.take())


def test_autograds_threads_count_and_may_leave_late() -> None:
    assert Steps().run("exchange") == {"backward": 1.0, "exchange": 6.0, "optimizer": 24.0}


def test_files_written_in_the_background_take_nothing_from_a_step() -> None:
    assert Steps().run("writing") == {"backward": 3.0, "optimizer": 24.0}


class Event:
    """A device's event: the time it gets is known once somebody has waited."""

    made: list[Event]
    waited = 0
    clock: Time

    def __init__(self) -> None:
        Event.made.append(self)

    def record(self) -> None:
        self.at, self.known = Event.clock.at, False

    def synchronize(self) -> None:
        Event.waited += 1
        for event in Event.made:
            event.known = True

    def elapsed_time(self, last: Event) -> float:
        assert self.known
        assert last.known
        return 1e3 * (last.at - self.at)


def test_a_device_is_waited_for_once_a_look_and_its_events_are_used_again() -> None:
    Event.made, Event.waited, Event.clock = [], 0, Time()
    timed = Timer(DeviceMarks(Event))
    with listening(timed):
        for look in range(1, 4):
            for _ in range(5):
                with phase("image_tower"):
                    Event.clock.at += 1.0
                with phase("backward"):
                    Event.clock.at += 2.0
            assert Event.waited == look - 1
            assert spent(timed.take()) == {"image_tower": 5.0, "backward": 10.0}
    assert Event.waited == 3
    assert len(Event.made) == 1 + 20 + 1  # none was made after the first look


@pytest.mark.gpu
def test_on_a_gpu_the_work_is_timed_where_it_runs() -> None:
    timed = timer(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    with listening(timed):
        with phase("image_tower"):
            for _ in range(50):
                matrix = matrix @ matrix.T / 4096
        with phase("optimizer"):
            matrix += 1
    found = timed.take()
    assert found["image_tower"] > found["optimizer"] > 0


def _record() -> dict[str, Any]:
    now = Time()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meter = Meter(World(rank, size, rank, torch.device("cpu")), now=now)
    meter.timer = Timer(WallMarks(now))
    with listening(meter.timer):
        for _ in range(2):
            with phase("data"):
                now.at += 1.0 + rank
            with phase("backward"):
                now.at += 5.0 - rank
            now.at += 2.0
            meter.step(8)
    one = torch.tensor(1.0)
    report = StepReport(loss=one, terms={}, grad_norms=GradNorms(one, one, one), logit_scale=one, logit_bias=None)
    return meter.record(report, step=2, epoch=0, samples=16, lr=1.0)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_record_has_seconds_a_step_over_ranks_and_they_add_up(ranks: Any) -> None:
    for record in ranks(2).run(_record):
        others = {"text_tower", "image_tower", "loss", "exchange", "optimizer"}
        assert record["phases_s"] == dict.fromkeys(others, 0.0) | {"data": 1.5, "backward": 4.5, "other": 2.0}
        assert sum(record["phases_s"].values()) == record["step_s"] == 8.0
