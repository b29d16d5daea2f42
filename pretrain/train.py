"""The main job. Read `train`, `Training.fit` and step.py in this order: that is the whole way of a batch.

Everything that happens once, or once in a while, is a method below `fit`, called by its name.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from pretrain import checkpoint, claim, ema, engines, objectives, optim, record, runfile, seed, snapshot, step
from pretrain.arithmetic import open_exchange
from pretrain.checks import check_world
from pretrain.config import Run
from pretrain.data import wanted
from pretrain.data.loader import Loader, combine, row_digests, train_loader, train_source
from pretrain.data.texts import tokenizer
from pretrain.errors import Stopped, UserError
from pretrain.metrics import Meter
from pretrain.model import DualEncoder, build
from pretrain.phases import phase
from pretrain.profiling.recorder import Recorder
from pretrain.profiling.window import Window
from pretrain.signals import StopRequest
from pretrain.sinks import Sinks, open_sinks
from pretrain.values import Batch, Features, StepReport, Terms
from pretrain.world import World, join

log = logging.getLogger(__name__)


def train(run: Run, stop: StopRequest, window: Window | None = None) -> None:
    """Train, or go on training, until the run's samples are seen.

    Args:
        window: steps of this start to profile.

    Raises:
        UserError: the run cannot be; the same one on every rank.
        Stopped: a signal came; a checkpoint of the last finished step is on disk.
    """
    with join(run.train.timeout_s) as world:
        check_world(run, world.size)
        use_threads(run)
        with phase("start"):
            claim.claim(run.path, run, world, runfile.dump(run))
            found = checkpoint.newest(run.path, world)
            training = Training(run, world, known=checkpoint.read_facts(found) if found else {})
            snapshot.restore(training, found)
            recorder = Recorder(window, run.path / "profile", world, training.steps_left)
        training.fit(stop, recorder)


class Training:
    """The parts of a run on this rank, and how far it is."""

    def __init__(self, run: Run, world: World, known: Mapping[str, Any]) -> None:
        self.run, self.world = run, world
        self.step, self.skipped, self.saved_at = 0, 0, time.monotonic()
        with world.together("building the run"):
            self.objectives = [objectives.find(choice.name)(choice.options) for choice in run.objective]
            self.wanted = wanted.of_objectives(self.objectives)
            device = engines.starts_on(run.engine, world)
            self.model = build(run.model, self.objectives, run.seed, device, known.get("model"))
            self.source = train_source(run.data, world, self.model.image_spec, self.wanted)
            if world.is_main:  # the others hear of it
                wanted.refuse_missing(self.wanted, self.source)
            self.tokenize = tokenizer.build(self.model.architecture.name)
            refuse_inexact(run, self.model, world)
        self.exchange = open_exchange(run, world, int(self.model.architecture.towers["embed_dim"]))
        self.engine = engines.find(run.engine, world.size)(self.model, run.optim, world, run.parallel)
        self.average = ema.of(self.engine, self.model.towers, run.optim.ema_decay)
        seed.seed_everything(run.seed, world.rank)

    def fit(self, stop: StopRequest, recorder: Recorder) -> None:
        """Every remaining step."""
        optim.tell(self.run.optim, self.run.train.global_batch)
        with self.loader() as loader, self.sinks() as sinks, Meter(self.world, self.skipped, loader=loader) as meter:
            for batch, waited_s in recorder.over(self.batches(loader), meter.clock.paused):
                lr = optim.learning_rate(self.run.optim, self.samples, self.total_samples, self.run.train.global_batch)
                terms, features = self.forward_backward(batch)
                with phase("optimizer"):
                    norms = self.engine.step(lr, self.run.optim.clip_norm)
                    if self.average is not None:
                        self.average.update(self.model.towers)
                self.step += 1
                meter.step(self.run.train.global_batch, batch.skips, waited_s)
                if self.step % self.run.log.every_steps == 0 or self.samples == self.total_samples:
                    with phase("logging"):
                        self.tell(sinks, meter, batch, StepReport.of(terms, features, norms), lr)
                self.save_or_stop(stop, sinks, meter)

    def forward_backward(self, batch: Batch) -> tuple[Terms, Features]:
        """The plain step where a rank's rows fit in memory, the cached-feature step where they do not."""
        micro_batch = self.run.train.micro_batch or len(batch)
        if micro_batch >= len(batch):
            return step.plain_step(self.engine, self.objectives, self.exchange, batch)
        return step.cached_step(self.engine, self.objectives, self.exchange, batch, micro_batch)

    @property
    def samples(self) -> int:
        """Samples seen by all ranks: the whole state of the data order, and the x axis of every curve."""
        return self.step * self.run.train.global_batch

    @cached_property
    def total_samples(self) -> int:
        """Length of the run, in whole steps."""
        asked = self.run.train.samples or math.ceil((self.run.train.epochs or 0) * len(self.source))
        return math.ceil(asked / self.run.train.global_batch) * self.run.train.global_batch

    @property
    def steps_left(self) -> int:
        """From here to the end of the run."""
        return (self.total_samples - self.samples) // self.run.train.global_batch

    def tell(self, sinks: Sinks, meter: Meter, batch: Batch, report: StepReport, lr: float) -> None:
        """The record of the step just done, means over ranks, to every sink."""
        digest = self.digest(batch) if self.run.log.batch_digest else None
        epoch = self.samples / len(self.source)
        named: dict[str, Any] = {"step": self.step, "epoch": epoch, "samples": self.samples, "batch_digest": digest}
        sinks.write(meter.record(report, **named, lr=lr, sent=self.exchange.sent))
        sinks.skips(meter.take_skips())
        self.skipped = meter.skipped

    def digest(self, batch: Batch) -> str:
        """Hash of the global batch's keys, pixels and tokens; the same for any number of ranks."""
        return combine([row for rows in self.world.share(row_digests(batch)) for row in rows])

    def save_or_stop(self, stop: StopRequest, sinks: Sinks, meter: Meter) -> None:
        """Save when it is time, at the end, or when some rank was asked to stop: decided alike on every rank."""
        save, done = self.run.checkpoint, self.samples == self.total_samples
        late = save.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * save.every_minutes
        with phase("agreeing"):
            stopping, late = self.world.any(stop.received is not None, late)
        due = save.every_steps is not None and self.step % save.every_steps == 0
        if stopping or late or due or done:
            with meter.clock.paused():
                sinks.skips(meter.take_skips())
                self.skipped = meter.skipped
                self.save()
            sinks.event("saved", step=self.step)
        if stopping and not done:
            sinks.event("stopped", step=self.step, signal=stop.received)
            came = stop.received or "a signal to another rank"
            raise Stopped(f"{came} came: saved after step {self.step}, start again to go on")

    def save(self) -> None:
        """A checkpoint of this moment; older ones are pruned once it is safe on disk."""
        with phase("staging"):
            state = snapshot.take(self)
        checkpoint.save(self.run.path, state, self.world, runfile.dump(self.run))
        with phase("pruning"):
            if self.world.is_main:
                checkpoint.prune(self.run.path, self.run.checkpoint.keep_last, self.run.checkpoint.milestone_steps)
        self.saved_at = time.monotonic()

    def loader(self) -> Loader:
        """This rank's part of every remaining global batch."""
        spec, window = self.model.image_spec, (self.samples, self.total_samples)
        return train_loader(self.run, self.world, spec, self.tokenize, *window, self.source, self.wanted)

    def batches(self, loader: Loader) -> Iterator[tuple[Batch, float]]:
        """Every batch with the seconds waited for it; what stops the data of one rank stops all, with its reason."""
        batches, waited_s = iter(loader), loader.wait_s
        while True:
            with phase("data"), self.world.together("reading data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch, loader.wait_s - waited_s
            waited_s = loader.wait_s

    def sinks(self) -> Sinks:
        """Where numbers go; the start itself is an event, with the process that each rank is."""
        with self.world.together("opening the run's files"):
            sinks = open_sinks(self.run, self.world, self.total_samples, self.step, self.samples)
            if self.world.is_main:
                record.append(self.run.path, record.environment(self.run))
                record.keep_data(self.run.path, self.source.facts, fresh=self.step == 0)
                if self.source.damage and not self.step:
                    sinks.skips(self.source.damage)
                    log.warning("data.train: shards are damaged: %d notes in skips.jsonl", len(self.source.damage))
        sinks.event("start", step=self.step, ranks=self.world.size, pids=self.world.share(os.getpid()))
        return sinks


def refuse_inexact(run: Run, model: DualEncoder, world: World) -> None:
    """Refuse a cached-feature step that could not give the gradients of the plain one."""
    share, micro_batch = run.train.global_batch // world.size, run.train.micro_batch
    if model.has_batch_norms and micro_batch is not None and micro_batch < share:
        raise UserError(
            f"train.micro_batch {micro_batch}: model.name {run.model.name} has BatchNorm, whose rows depend on each "
            f"other; leave it at {share} (a rank's share), lock the tower, or take a model without"
        )


def use_threads(run: Run) -> None:
    """Share the machine's cores out among its ranks, unless train.threads or OMP_NUM_THREADS says how many."""
    if run.train.threads is None and "OMP_NUM_THREADS" in os.environ:
        return  # torch has read it
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(run.train.threads or max(1, cores // local))
