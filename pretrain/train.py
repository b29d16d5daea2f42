"""The main job. Read `train`, `Training.fit` and step.py in this order: that is the whole way of a batch.

Everything that happens once, or once in a while, is a method below `fit`, called by its name.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time

import torch

from pretrain import checkpoint, engines, exchange, objectives, optim, record, runfile, seed, step
from pretrain.checkpoint import State
from pretrain.config import Run, check_world
from pretrain.data import tokenizer
from pretrain.data.loader import Loader, combine, row_digests, train_loader
from pretrain.ema import Average
from pretrain.errors import Stopped, UserError
from pretrain.metrics import Meter
from pretrain.model import DualEncoder, build
from pretrain.signals import StopRequest
from pretrain.sinks import open_sinks
from pretrain.values import Batch, Features, StepReport, Terms
from pretrain.world import World, join

log = logging.getLogger("pretrain")


def train(run: Run) -> None:
    """Train, or go on training, until the run's samples are seen.

    Raises:
        UserError: the run cannot be; the same one on every rank.
        Stopped: a signal came; a checkpoint of the last finished step is on disk.
    """
    with StopRequest() as stop, join(run.train.timeout_s) as world:
        check_world(run, world.size)
        use_threads(run, world)
        checkpoint.claim(run.path, run, world, runfile.dump(run))
        training = Training(run, world)
        training.restore()
        training.fit(stop)


class Training:
    """The parts of a run on this rank, and how far it is."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world = run, world
        self.step_number, self.saved_at, self.saved_time = 0, 0, time.monotonic()
        seed.seed_everything(run.seed, rank=0)  # the same weights on every rank
        with world.together("building the model and the objective"):
            self.objectives = [objectives.find(choice.name)(choice.options) for choice in run.objective]
            self.model: DualEncoder = build(run.model, self.objectives, run.seed, world.device)
            self.tokenize = tokenizer.build(run.model.name)
        self.exchange = exchange.find(run.exchange, world.size)(world.rank, world.size)
        self.engine = engines.find(run.engine, world.size)(self.model, run.optim, world)
        self.average = Average(self.model, run.optim.ema_decay) if run.optim.ema_decay is not None else None

    def fit(self, stop: StopRequest) -> None:
        """Every remaining step."""
        with self.open_loader() as loader, open_sinks(self.run, self.world) as sinks:
            for batch in loader:
                lr = optim.learning_rate(self.run.optim, self.samples, self.total_samples)
                terms, features = self.forward_backward(batch)
                grad_norms = self.engine.step(lr, self.run.optim.clip_norm)
                if self.average is not None:
                    self.average.update(self.model)
                self.step_number += 1
                self.tell(sinks, loader, batch, StepReport.of(terms, features, grad_norms), lr)
                self.save_or_stop(stop)

    def forward_backward(self, batch: Batch) -> tuple[Terms, Features]:
        """The plain step where a rank's rows fit in memory, the cached-feature step where they do not."""
        micro_batch = self.run.train.micro_batch or len(batch)
        if micro_batch >= len(batch):
            return step.plain_step(self.engine, self.objectives, self.exchange, batch)
        return step.cached_step(self.engine, self.objectives, self.exchange, batch, micro_batch)

    @property
    def samples(self) -> int:
        """Samples seen by all ranks: the whole state of the data order, and the x axis of every curve."""
        return self.step_number * self.run.train.global_batch

    @property
    def total_samples(self) -> int:
        """Length of the run, in whole steps."""
        asked = self.run.train.samples or math.ceil((self.run.train.epochs or 0) * self.data.samples_per_epoch)
        return max(1, math.ceil(asked / self.run.train.global_batch)) * self.run.train.global_batch

    def tell(self, sinks: Sinks, batch: Batch, report: StepReport, lr: float) -> None:
        """Skipped samples always; metrics every so many steps, and at the last one."""
        self.meter.step(batch, self.data.wait_s)
        sinks.skips(batch.skips)
        if self.step_number % self.run.log.every_steps and self.samples < self.total_samples:
            return
        digest = self.digest(batch) if self.run.log.batch_digest else None
        sinks.write(self.meter.record(report, self.step_number, self.samples, lr, digest, self.world))

    def digest(self, batch: Batch) -> str:
        """Hash of the global batch's keys, pixels and tokens; the same for any number of ranks."""
        return combine([row for rows in self.world.share(row_digests(batch)) for row in rows])

    def save_or_stop(self, stop: StopRequest) -> None:
        """Save when it is time, or when some rank was asked to stop, or at the end: decided alike on every rank."""
        save, minutes = self.run.checkpoint, (time.monotonic() - self.saved_time) / 60
        late = save.every_minutes is not None and minutes >= save.every_minutes
        stopping, late = self.world.any(stop.received is not None, late)
        due = save.every_steps is not None and self.step_number % save.every_steps == 0
        if stopping or late or due or self.samples >= self.total_samples:
            self.save()
        if stopping and self.samples < self.total_samples:
            raise Stopped(f"stopped by {stop.received or 'a signal to another rank'} after step {self.step_number}; start again to go on")

    def save(self) -> None:
        """A checkpoint of this moment; older ones are pruned when it is safe on disk."""
        state = State(
            step=self.step_number,
            samples=self.samples,
            weights=self.engine.model_state(),
            average=self.average.state() if self.average is not None else None,
            optimizer=self.engine.optimizer_state(),
            objective={f"{n}.{k}": v for n, o in enumerate(self.objectives) for k, v in o.state_dict().items()},
            rng=seed.rng_state(),
            facts={"data": self.data.fingerprint, "samples_per_epoch": self.data.samples_per_epoch, "tokenizer": self.tokenize.fingerprint},
        )
        checkpoint.save(self.run.path, state, self.world, runfile.dump(self.run))
        if self.world.is_main:
            checkpoint.prune(self.run.path, self.run.checkpoint.keep_last, self.run.checkpoint.milestone_steps)
        self.saved_time = time.monotonic()

    def restore(self) -> None:
        """Go on from the newest good checkpoint of the run folder, if it holds one."""
        found = checkpoint.newest(self.run.path, self.world)
        if found is None:
            return
        if not self.run.checkpoint.resume:
            raise UserError(f"checkpoint.resume is False, but {found} exists: use another name, or remove the folder")
        state = checkpoint.load(found, self.world)
        for fact, now in (("data", self.data.fingerprint), ("tokenizer", self.tokenize.fingerprint)):
            if state.facts.get(fact) != now:
                raise UserError(f"{found}: the {fact} changed since ({state.facts.get(fact)} -> {now}); restore it, or start under another name")
        self.step_number = state.step
        self.engine.load(state.weights, state.optimizer)
        if self.average is not None and state.average is not None:
            self.average.load(state.average)
        for number, objective in enumerate(self.objectives):
            prefix = f"{number}."
            objective.load_state_dict({k.removeprefix(prefix): v for k, v in state.objective.items() if k.startswith(prefix)})
        if state.rng:
            seed.set_rng_state(state.rng)
        log.info("going on from %s", found)
