"""What a run measures: how fast it goes, how long it waits for data, and the record of a logged step."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.data.stages import STAGES, Work, diagnose
from pretrain.phases import listening
from pretrain.profiling.timer import STEP, timer
from pretrain.values import Skip, StepReport
from pretrain.world import World

KEYS = (
    *("step", "epoch", "samples", "loss", "terms", "lr", "logit_scale", "logit_bias", "grad_norm", "samples_per_s"),
    *("step_s", "data_wait_s", "phases_s", "exchange_bytes", "peak_memory_bytes", "skipped", "truncated"),
    *("batch_digest", "steps_skipped", "rewinds", "geometry", "weights_hash"),
)
"""Keys of a record, in order: metrics.jsonl has exactly these. `skipped` counts samples since the run began,
`truncated` the captions that were cut to the context length since the last record, both over all ranks; `phases_s` has
seconds a step of each phase, means over ranks, and `other` is the rest of `step_s`. The last four are the guard's:
steps left out since the run began, times that it went back, `guard.geometry.NAMES`, and the hash of the
weights where it was taken."""
MAX_WAIT = 0.01
"""Share of a step's time; steps that wait longer for data are told why."""
QUIET_WINDOWS = 20
"""Records from one such line to the next."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """Means over the steps since the last look."""

    samples_per_s: float
    """Pairs of all ranks."""
    step_s: float
    """Wall time per step, waiting included."""


class Clock:
    """Times windows of steps. Steps on a GPU return before they are done: look only after reading a result back."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self._steps, self._samples, self._waited = 0, 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        begin = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training (evaluating, saving), so that throughput does not fall with it."""
        begin = self._now()
        try:
            yield
        finally:
            self._start += self._now() - begin

    def step(self, samples: int, waited_s: float = 0.0) -> None:
        """One optimizer step of `samples` pairs over all ranks was done.

        Args:
            waited_s: wait for its data, where the loader measures that itself.
        """
        self._steps += 1
        self._samples += samples
        self._waited += waited_s

    @property
    def steps(self) -> int:
        """Optimizer steps since the last look."""
        return self._steps

    @property
    def data_wait_s(self) -> float:
        """This rank's wait for data per step since the last look."""
        return self._waited / max(self._steps, 1)

    def look(self) -> Speed:
        """Speed since the last look, and begin the next window."""
        elapsed, steps = max(self._now() - self._start, 1e-9), max(self._steps, 1)
        speed = Speed(self._samples / elapsed, elapsed / steps)
        self._start, self._steps, self._samples, self._waited = self._now(), 0, 0, 0.0
        return speed


class Loading(Protocol):
    """A loader, as far as it is measured."""

    @property
    def workers(self) -> int:
        """Processes of this rank."""
        ...

    @property
    def ahead(self) -> int:
        """Batches that may lie ready."""
        ...

    @property
    def work(self) -> Work:
        """Of this rank so far."""
        ...


class Meter:
    """Makes records of logged steps; every rank keeps one, because losses are means over ranks.

    Within its `with` block it times the phases of this rank.
    """

    def __init__(
        self,
        world: World,
        skipped: int = 0,
        now: Callable[[], float] = time.perf_counter,
        loader: Loading | None = None,
    ) -> None:
        """
        Args:
            skipped: samples replaced before this start of the run, over all ranks.
            loader: whose work is told; None: nobody's, and nothing is said of it.
        """
        self.world = world
        self.clock = Clock(now)
        self.timer = timer(world.device)
        self._listening = listening(self.timer)
        self.skipped = skipped
        self._skips: list[Skip] = []
        self._sent = 0
        self._loader, self._worked = loader, Work()
        self._steps, self._quiet, self._said = 0, 0, 0.0

    def __enter__(self) -> Meter:
        self._listening.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._listening.__exit__(None, None, None)

    def step(self, samples: int, skips: Sequence[Skip] = (), waited_s: float = 0.0) -> None:
        """One optimizer step was done.

        Args:
            samples: pairs over all ranks.
            skips: samples that had to be replaced among this rank's rows.
            waited_s: this rank's wait for its batch, unless `clock.waiting()` surrounded it.
        """
        self.clock.step(samples, waited_s)
        self._steps += 1
        self._skips += skips

    def record(
        self,
        report: StepReport,
        *,
        step: int,
        epoch: float,
        samples: int,
        lr: float,
        batch_digest: str | None = None,
        sent: int = 0,
        guard: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The record of the step just done, with `KEYS`. All ranks call it: losses are averaged by one all-reduce.

        Args:
            step: optimizer steps done.
            epoch: passes over the data done, with its fraction.
            samples: pairs seen.
            lr: learning rate of the step.
            sent: bytes that the loss's exchange has sent from this rank so far.
            guard: its four entries; None: nothing watches.
        """
        found = self._means(report, (sent - self._sent) / max(self.clock.steps, 1))
        self._sent = sent
        values = self._times(found) | {
            "skipped": self.skipped + round(found.pop("skipped") * self.world.size),
            "truncated": round(found.pop("work/truncated") * self.world.size),
            "exchange_bytes": round(found.pop("exchange_bytes")),
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            "grad_norm": {name: found.pop(f"grad_norm/{name}") for name in ("total", "image", "text")},
            "loss": found.pop("loss"),
            "logit_scale": found.pop("logit_scale"),
            "logit_bias": found.pop("logit_bias", None),
            "terms": {name.removeprefix("terms/"): value for name, value in found.items()},
        }
        values |= {"step": step, "epoch": epoch, "samples": samples, "lr": lr, "batch_digest": batch_digest}
        values |= guard or {"steps_skipped": 0, "rewinds": 0, "geometry": {}, "weights_hash": None}
        return {key: values[key] for key in KEYS}

    def _times(self, found: dict[str, float]) -> dict[str, Any]:
        """Speed and wait since the last record, taken out of the means over ranks."""
        first = self._steps - self.clock.steps
        speed, data_wait_s = self.clock.look(), found.pop("data_wait_s")
        seconds = {stage: found.pop(f"work/{stage}") for stage in STAGES}
        # Until the batches made before the first step are used up, waits say nothing of those that follow.
        if self._loader is not None and first > self._loader.ahead:
            self._tell_wait(self._loader, data_wait_s / speed.step_s, seconds, speed.samples_per_s / self.world.size)
        phases = {name: found.pop(f"phases/{name}") for name in STEP}
        times = {"samples_per_s": speed.samples_per_s, "step_s": speed.step_s, "data_wait_s": data_wait_s}
        return times | {"phases_s": phases | {"other": max(0.0, speed.step_s - sum(phases.values()))}}

    def take_skips(self) -> list[Skip]:
        """Skips of all ranks since the last call, in sample order; `skipped` now counts them.

        All ranks call it, at the latest before a checkpoint, so that none is lost; cheap where there are none.
        """
        own, self._skips = self._skips, []
        if not self.world.any(bool(own))[0]:
            return []
        everyone = sorted((skip for skips in self.world.share(own) for skip in skips), key=lambda skip: skip.index)
        self.skipped += len(everyone)
        return everyone

    def _tell_wait(self, loader: Loading, share: float, seconds: Mapping[str, float], samples_per_s: float) -> None:
        """One line of the first rank where steps wait for data. It is not said again for QUIET_WINDOWS records, unless
        they wait twice as long."""
        self._quiet -= 1
        if share <= MAX_WAIT or (self._quiet >= 0 and share <= 2 * self._said):
            return
        self._quiet, self._said = QUIET_WINDOWS, share
        if self.world.is_main:
            log.warning("%s", diagnose(share, seconds, samples_per_s, loader.workers))

    def _work(self) -> Work:
        """What this rank's loader has done since the last record."""
        if self._loader is None:
            return Work()
        before, self._worked = self._worked, replace(self._loader.work)
        return self._worked.since(before)

    def _means(self, report: StepReport, exchange_bytes: float) -> dict[str, float]:
        """Means over ranks of everything on the device, in one all-reduce and one copy to the host."""
        work, steps = self._work(), max(self.clock.steps, 1)
        named: dict[str, Tensor | float] = {
            "loss": report.loss,
            "logit_scale": report.logit_scale,
            "grad_norm/total": report.grad_norms.total,
            "grad_norm/image": report.grad_norms.image,
            "grad_norm/text": report.grad_norms.text,
            **({} if report.logit_bias is None else {"logit_bias": report.logit_bias}),
            **{f"terms/{name}": report.terms[name] for name in sorted(report.terms)},
            "skipped": float(len(self._skips)),
            "data_wait_s": self.clock.data_wait_s,
            "exchange_bytes": exchange_bytes,
            **{f"work/{name}": float(getattr(work, name)) for name in (*STAGES, "truncated")},
            **{f"phases/{name}": seconds / steps for name, seconds in self.timer.take().items()},
        }
        device = report.loss.device
        # fp64: a sum of W equal fp32 numbers divided by W is then that number again.
        parts = [
            torch.as_tensor(value, dtype=torch.float64).detach().reshape(()).to(device) for value in named.values()
        ]
        stacked = torch.stack(parts)
        if self.world.size > 1:
            dist.all_reduce(stacked)
            stacked /= self.world.size
        return dict(zip(named, stacked.tolist(), strict=True))


def time_left_s(total_samples: int, samples: int, samples_per_s: float) -> float | None:
    """Seconds to the end at this speed; None before there is one."""
    return max(0, total_samples - samples) / samples_per_s if samples_per_s > 0 else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has used: allocated on its GPU, or resident in its process where it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
