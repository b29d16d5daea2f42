"""The clock, and the record of a logged step: its keys, means over ranks, skips."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from pretrain.data.stages import Work
from pretrain.metrics import KEYS, QUIET_WINDOWS, Clock, Meter, peak_memory_bytes, time_left_s
from pretrain.values import GradNorms, Skip, StepReport
from pretrain.world import World

ONE = World(0, 1, 0, torch.device("cpu"))


class Time:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def report(loss: float, bias: bool = True) -> StepReport:
    return StepReport(
        loss=torch.tensor(loss, requires_grad=True),
        terms={"b": torch.tensor(loss / 4), "a": torch.tensor(loss * 3 / 4)},
        grad_norms=GradNorms(torch.tensor(5.0), torch.tensor(3.0), torch.tensor(4.0)),
        logit_scale=torch.tensor(14.3),
        logit_bias=torch.tensor(-10.0) if bias else None,
    )


def test_throughput_wait_and_pauses() -> None:
    now = Time()
    clock = Clock(now)
    for _ in range(2):
        with clock.waiting():
            now.at += 1.0
        now.at += 3.0
        clock.step(32)
    with clock.paused():
        now.at += 1000.0
    assert clock.data_wait_s == 1.0
    assert clock.look().samples_per_s == 64 / 8
    now.at += 2.0
    clock.step(32, waited_s=0.5)
    assert clock.data_wait_s == 0.5
    speed = clock.look()
    assert speed.samples_per_s == 16.0
    assert speed.step_s == 2.0


def test_nothing_done_is_no_division_by_zero() -> None:
    clock = Clock(Time())
    assert clock.look().samples_per_s == 0.0
    assert clock.data_wait_s == 0.0


def test_record_has_exactly_the_documented_keys() -> None:
    now = Time()
    meter = Meter(ONE, skipped=2, now=now)
    meter.step(32, [Skip(4, "a.tar", "k", "bad jpeg")], waited_s=0.25)
    meter.step(32)
    now.at += 4.0
    record = meter.record(report(2.0), step=9, epoch=0.5, samples=288, lr=1e-3, batch_digest="ab", sent=3000)
    assert tuple(record) == KEYS
    documented = "step, epoch, samples, loss, terms, lr, logit_scale, logit_bias, grad_norm, samples_per_s, step_s, "
    assert (
        ", ".join(record)
        == documented
        + "data_wait_s, phases_s, exchange_bytes, peak_memory_bytes, skipped, truncated, batch_digest"
        ", steps_skipped, rewinds, geometry, weights_hash"
    )
    assert record["grad_norm"] == {"total": 5.0, "image": 3.0, "text": 4.0}
    assert record["terms"] == {"a": 1.5, "b": 0.5}
    assert record["loss"] == 2.0
    assert record["logit_scale"] == pytest.approx(14.3)
    assert record["logit_bias"] == -10.0
    assert record["samples_per_s"] == 16.0
    assert record["data_wait_s"] == 0.125
    assert record["exchange_bytes"] == 1500
    assert record["skipped"] == 3
    assert (record["step"], record["samples"], record["batch_digest"]) == (9, 288, "ab")
    assert [skip.index for skip in meter.take_skips()] == [4]
    assert meter.skipped == 3
    meter.step(32)
    again = meter.record(report(2.0, bias=False), step=10, epoch=0.5, samples=320, lr=1e-3, sent=3700)
    assert again["exchange_bytes"] == 700
    assert again["skipped"] == 3
    assert again["logit_bias"] is None
    assert again["batch_digest"] is None


def test_a_term_may_have_any_name() -> None:
    found = report(1.0)
    found.terms["loss"] = torch.tensor(7.0)
    found.terms["skipped"] = torch.tensor(8.0)
    record = Meter(ONE).record(found, step=1, epoch=0, samples=1, lr=1.0)
    assert record["loss"] == 1.0
    assert record["terms"]["loss"] == 7.0
    assert record["skipped"] == 0


def test_skips_are_taken_once_in_order() -> None:
    meter = Meter(ONE)
    skips = [Skip(index, "a.tar", "k", "why") for index in (5, 2)]
    meter.step(8, skips)
    assert [skip.index for skip in meter.take_skips()] == [2, 5]
    assert meter.take_skips() == []


def test_time_left() -> None:
    assert time_left_s(100, 40, 6.0) == 10.0
    assert time_left_s(100, 140, 6.0) == 0.0
    assert time_left_s(100, 40, 0.0) is None


def test_peak_memory_is_in_bytes() -> None:
    block = bytearray(os.urandom(1 << 20) * 64)
    peak = peak_memory_bytes(torch.device("cpu"))
    assert len(block) < peak < 1 << 40


def _record() -> tuple[dict[str, Any], list[int], int]:
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    loader = Loading()
    meter = Meter(World(rank, size, rank, torch.device("cpu")), loader=loader)
    loader.work.truncated = 4 + rank
    calls, reduce = [0], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return reduce(*args, **kwargs)

    meter.step(8, [Skip(10 - rank, "a.tar", "k", "why")] * (rank + 1), waited_s=float(rank))
    dist.all_reduce = counted  # type: ignore[assignment]
    try:
        record = meter.record(report(1.0 + 2 * rank), step=1, epoch=0, samples=8, lr=1.0)
    finally:
        dist.all_reduce = reduce  # type: ignore[assignment]
    return record, [skip.index for skip in meter.take_skips()], calls[0]


@pytest.mark.ranks
@pytest.mark.slow
def test_means_over_ranks_by_one_all_reduce(ranks: Any) -> None:
    for record, skips, calls in ranks(2).run(_record):
        assert record["loss"] == 2.0
        assert record["terms"] == {"a": 1.5, "b": 0.5}
        assert record["grad_norm"] == {"total": 5.0, "image": 3.0, "text": 4.0}
        assert record["logit_scale"] == float(torch.tensor(14.3))
        assert record["data_wait_s"] == 0.5
        assert record["skipped"] == 3
        assert record["truncated"] == 9
        assert skips == [9, 9, 10]
        assert calls == 1


class Loading:
    """What a meter asks of a loader."""

    workers, ahead = 2, 3

    def __init__(self) -> None:
        self.work = Work()


def windows(count: int, waited_s: float, now: Time, meter: Meter, loader: Loading) -> None:
    """Records of one step of a second each, whose data came after `waited_s`."""
    for step in range(count):
        loader.work.add(Work(read=0.1, decode=1.5, text=0.2, idle=0.2, samples=410))
        meter.step(410, waited_s=waited_s)
        now.at += 1.0
        meter.record(report(1.0), step=step, epoch=0, samples=step, lr=1.0)


def test_steps_that_wait_are_told_why_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now, loader = Time(), Loading()
    meter = Meter(ONE, now=now, loader=loader)
    windows(4, 0.5, now, meter, loader)
    assert not caplog.messages, "the first batches were made before the first step"
    windows(QUIET_WINDOWS, 0.31, now, meter, loader)
    assert caplog.messages == [
        "data: steps wait 31 % of the time for data; decoding is the limit (75 % of the workers' time, 2 workers at "
        "410 samples/s): raise data.workers or pack smaller images"
    ]
    windows(QUIET_WINDOWS, 0.31, now, meter, loader)
    assert len(caplog.messages) == 2
    windows(2, 0.7, now, meter, loader)
    assert len(caplog.messages) == 3, "much worse is worth a word"


def test_nothing_is_said_where_the_loader_keeps_up_or_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    now, loader = Time(), Loading()
    windows(30, 0.009, now, Meter(ONE, now=now, loader=loader), loader)
    windows(30, 0.9, now, Meter(ONE, now=now), loader)
    windows(30, 0.9, now, Meter(World(1, 1, 1, ONE.device), now=now, loader=loader), loader)
    assert not caplog.messages


def test_cut_captions_are_those_since_the_last_record() -> None:
    loader = Loading()
    meter = Meter(ONE, loader=loader)
    found = []
    for step, cut in enumerate((3, 0, 4)):
        loader.work.truncated += cut
        meter.step(8)
        found.append(meter.record(report(1.0), step=step, epoch=0, samples=8, lr=1.0)["truncated"])
    assert found == [3, 0, 4]
