"""Where the time goes, and what is said of it: with real workers over a fast and an artificially slow data set."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from pretrain.config import Data, Run, Train
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.loader import train_loader
from pretrain.data.shards.reader import RawSample
from pretrain.data.stages import Stages, Work, diagnose
from pretrain.data.synthetic import SyntheticSource
from pretrain.metrics import MAX_WAIT, Meter
from pretrain.values import GradNorms, StepReport
from pretrain.world import World

SPEC = ImageSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("seconds", "workers", "said"),
    [
        (
            (6, 3, 1, 0),
            2,
            "reading is the limit (60 % of the workers' time, 2 workers at 1,234 samples/s): raise data",
        ),
        (
            (1, 8, 1, 0),
            1,
            "decoding is the limit (80 % of the workers' time, 1 worker at 1,234 samples/s): raise data",
        ),
        ((1, 2, 7, 0), 4, "tokenizing is the limit (70 % of the workers' time, 4 workers at 1,234 samples/s): raise"),
        ((1, 1, 1, 7), 4, "handing over is the limit (70 % of the workers' time, 4 workers at 1,234 samples/s): raise"),
        ((0, 6, 0, 4), 4, "decoding is the limit (60 %"),
        ((1, 9, 0, 0), 0, "(90 % of the loader's time, no workers at 1,234 samples/s): the training process does it"),
    ],
)
def test_the_limit_is_named_with_what_to_do(seconds: tuple[float, ...], workers: int, said: str) -> None:
    line = diagnose(0.31, dict(zip(("read", "decode", "text", "idle"), seconds, strict=True)), 1234.4, workers)
    assert line.startswith("data: steps wait 31 % of the time for data; ")
    assert said in line
    assert "\n" not in line


def test_times_of_stages_add_up() -> None:
    notes: list[tuple[int, int]] = []
    stages = Stages(lambda stage, place: notes.append((stage, place)))
    with stages.at("read", 7):
        time.sleep(0.002)
    with pytest.raises(ZeroDivisionError), stages.at("decode", 7):
        1 / 0  # noqa: B018
    work = stages.take()
    assert work.read >= 0.002
    assert work.decode > 0
    assert work.text == work.idle == 0
    time.sleep(0.002)
    stages.resume()
    assert stages.take().idle >= 0.002
    assert notes == [(0, 7), (1, 7), (3, -1), (3, -1)]
    total = Work(read=1, samples=2)
    total.add(Work(read=2, decode=1, samples=3, truncated=4))
    assert total == Work(read=3, decode=1, samples=5, truncated=4)
    assert total.since(Work(read=1, samples=2)) == Work(read=2, decode=1, samples=3, truncated=4)


class Slow(SyntheticSource):
    def sample(self, number: int) -> RawSample:
        time.sleep(0.01)
        return super().sample(number)


def shares(source: SyntheticSource, words: Any, step_s: float, steps: int = 6) -> tuple[list[float], Work]:
    """Share of each step that waits, and the work of all, with one worker and a record for each step."""
    report = StepReport(*(torch.tensor(1.0), {}, GradNorms(*[torch.tensor(1.0)] * 3), torch.tensor(1.0), None))
    data = Data(train=("synthetic:1024",), workers=1, read_ahead=1)
    run = Run(data=data, train=Train(samples=1000, global_batch=8))
    found, before = [], 0.0
    with train_loader(run, ONE, SPEC, words, 0, 8 * steps, source) as loader:
        meter = Meter(ONE, loader=loader)
        for step, batch in enumerate(loader):
            time.sleep(step_s)
            meter.step(len(batch), batch.skips, loader.wait_s - before)
            before = loader.wait_s
            record = meter.record(report, step=step, epoch=0, samples=8 * step, lr=1.0)
            found.append(record["data_wait_s"] / record["step_s"])
    return found, loader.work


@pytest.mark.slow
def test_a_loader_that_keeps_up_is_seen_and_not_heard(words: Any, caplog: pytest.LogCaptureFixture) -> None:
    found, work = shares(SyntheticSource(64, (8, 8)), words, step_s=0.3)
    assert min(found) < MAX_WAIT, "a machine that does other things at once may have made some steps wait"
    assert work.samples == 48
    assert work.idle > work.read + work.decode + work.text
    settled = found[Data.prefetch + 1 :]  # what lay ready before the first step says nothing
    assert any(share > MAX_WAIT for share in settled) == bool(caplog.messages)


@pytest.mark.slow
def test_a_slow_data_set_is_named_as_the_limit(words: Any, caplog: pytest.LogCaptureFixture) -> None:
    found, work = shares(Slow(64, (8, 8)), words, step_s=0.0)
    assert min(found[1:]) > 0.5
    assert work.read > 0.5 * 48 * 0.01
    (line,) = caplog.messages
    assert "reading is the limit" in line
    assert "raise data.read_ahead" in line
