"""What a run measures while it trains: tasks that data.eval names, each time so many samples were seen, and at the end.

A copy of the encoders is measured, whole on every rank, so that ranks may have different numbers of held-out samples
under every engine, and so that nothing of the training is touched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain import evaluate, model
from pretrain.data import held_out
from pretrain.engines import shards
from pretrain.errors import Stopped, UserError
from pretrain.metrics import Meter
from pretrain.phases import phase
from pretrain.sinks import Sinks

if TYPE_CHECKING:
    from pretrain.train import Training

log = logging.getLogger(__name__)

BATCH = 256
"""Images or texts per rank and forward, at most; no more than training takes."""


class Evaluating:
    """The evaluations of a stretch of a run."""

    def __init__(self, training: Training, sinks: Sinks, meter: Meter) -> None:
        """Collective.

        Raises:
            UserError: a task does not exist, or its held-out data cannot be opened.
        """
        self._training, self._sinks, self._meter = training, sinks, meter
        with training.world.together("reading data.eval"):
            self._tasks = held_out.in_training(training.run.data)
            self._data = replace(training.run.data, eval=held_out.entries(training.run.data))
        for task in self._tasks:
            evaluate.check(training.model, task, self._data, training.world)

    def when_due(self) -> None:
        """Every task whose samples the step just done has filled up, and all of them at the end. Collective."""
        training, batch = self._training, self._training.run.train.global_batch
        done = training.samples == training.total_samples
        due = [task for task, every in self._tasks.items() if done or training.samples % every < batch]
        if due:
            with self._meter.clock.paused():
                encoder = twin(training)
                for task in due:
                    self._measure(task, encoder)

    def _measure(self, task: str, encoder: model.DualEncoder) -> None:
        """One task; what goes wrong is an event, and training goes on: it is saved, and does not need the figures."""
        training, started = self._training, time.monotonic()
        train = training.run.train
        share = train.micro_batch or max(1, train.global_batch // training.world.size)
        try:
            with phase("evaluating", task):
                metrics = evaluate.measure(encoder, task, self._data, training.world, min(BATCH, share))
                seconds = round(time.monotonic() - started, 3)
                self._tell(task, metrics, seconds)
        except (UserError, Stopped) as error:
            log.warning("%s was not measured at step %d: %s", task, training.step, error)
            self._sinks.event("not evaluated", task=task, step=training.step, reason=str(error))

    def _tell(self, task: str, metrics: Mapping[str, Any], seconds: float) -> None:
        training = self._training
        facts: dict[str, Any] = {
            "task": task,
            "checkpoint": None,
            "step": training.step,
            "average": training.average is not None,
        }
        facts |= {"data": list(self._data.eval), "world_size": training.world.size, "seconds": seconds}
        path = training.run.path / "eval" / f"{task}_{training.step:08d}.json"
        evaluate.save(path, facts | dict(metrics), training.world)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        self._sinks.event("evaluated", task=task, step=training.step, seconds=seconds, **numbers)
        self._sinks.track({f"{task}/{name}": value for name, value in numbers.items()}, training.samples)


def twin(training: Training) -> model.DualEncoder:
    """A copy of the run's encoders, with averaged weights where it keeps them, whole on every rank. Collective."""
    copy = model.twin(training.model, training.world.device)
    found = shards.whole(training.engine.model_state())
    if training.average is not None:
        found |= shards.whole(training.average.state())
    fill(copy.towers.state_dict(), found, training)
    return copy


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], training: Training) -> None:
    """Weights into tensors: from here where every rank has them all, else from rank 0. Collective."""
    (missing,) = training.world.any(not targets.keys() <= found.keys())
    for name, target in targets.items():
        if missing:
            shards.fill_from_main(target, found[name] if training.world.is_main else None)
        else:
            target.copy_(found[name])
