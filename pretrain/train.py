"""The main job. Read `train`, `Training.fit` and step.py in this order: that is the whole way of a batch.

Everything that happens once, or once in a while, is a method below `fit`, called by its name.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch

from pretrain import checkpoint, claim, ema, engines, objectives, optim, record, runfile, seed, snapshot, step, summary
from pretrain.arithmetic import open_exchange
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.writing import Keep
from pretrain.checks import check_world
from pretrain.config import Run
from pretrain.data import left_out, wanted
from pretrain.data.loader import Loader, combine, row_digests, train_loader, train_source
from pretrain.data.texts import tokenizer
from pretrain.errors import Stopped, UserError
from pretrain.evaluating import Evaluating
from pretrain.guard import rewind
from pretrain.guard.guard import Guard
from pretrain.metrics import Meter
from pretrain.model import DualEncoder, build
from pretrain.phases import phase
from pretrain.profiling.recorder import Recorder
from pretrain.profiling.window import Window
from pretrain.saving import Saving
from pretrain.signals import StopRequest, interruptible
from pretrain.sinks import Sinks, open_sinks
from pretrain.values import Batch, Features, Outcome, Terms
from pretrain.watch.watcher import watching
from pretrain.world import World, join

log = logging.getLogger(__name__)


def train(run: Run, stop: StopRequest, window: Window | None = None) -> None:
    """Train, or go on training, until the run's samples are seen.

    Args:
        window: steps of this start to profile.

    Raises:
        UserError: the run cannot be; the same one on every rank.
        Stopped: a signal came; a checkpoint of the last finished step is on disk.
        RanksLost: other ranks are gone, or did not come to a collective.
    """
    with watching(run) as watch, join(run.train.timeout_s, watch.traces) as world:
        stop.before_leaving = watch.end
        check_world(run, world.size)
        use_threads(run)
        with phase("start"), interruptible(world.size == 1):
            taken = claim.claim(run.path, run, world, runfile.dump(run))
            watch.open(run.path, world)
            found = checkpoint.newest(taken.homes, world)
            training = Training(run, world, checkpoint.read_facts(found) if found else {}, taken)
            snapshot.restore(training, found)
            recorder = Recorder(window, run.path / "profile", world, training.steps_left)
        watch.follow(training)
        training.fit(stop, recorder)


class Training:
    """The parts of a run on this rank, and how far it is."""

    def __init__(self, run: Run, world: World, known: Mapping[str, Any], taken: claim.Claim | None = None) -> None:
        self.run, self.world = run, world
        self.step, self.skipped, self.saved_at = 0, 0, time.monotonic()
        with world.together("building the run"), interruptible():
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
        keep = Keep(run.checkpoint.keep_last, run.checkpoint.milestone_steps)
        self.homes = taken.homes if taken else (checkpoint.home(run),)
        self.saver = Saver(checkpoint.home(run), world, taken.attempt if taken else None, keep)
        self.guard = Guard(run, world)
        seed.seed_everything(run.seed, world.rank)

    def fit(self, stop: StopRequest, recorder: Recorder) -> None:
        """Every remaining step; again from an earlier one where the guard goes back."""
        optim.tell(self.run.optim, self.run.train.global_batch)
        self.began_at: int = self.step
        self.saved_step: int | None = self.step
        self.summary = summary.tell(self)
        while self.stretch(stop, recorder):
            self.saved_step = None

    def stretch(self, stop: StopRequest, recorder: Recorder) -> bool:
        """Steps up to the end of the run (False), or up to where it has gone back (True)."""
        count = partial(Meter, self.world, self.skipped)
        with self.loader() as loader, self.sinks() as sinks, count(loader=loader) as meter, self.saver:
            saving, evaluating = Saving(self, stop, sinks, meter), Evaluating(self, sinks, meter)
            for batch, waited_s in recorder.over(self.batches(loader, saving), meter.clock.paused):
                outcome = self.advance(batch)
                meter.step(self.run.train.global_batch, batch.skips, waited_s)
                done = self.samples == self.total_samples
                logged = done or self.step % self.run.log.every_steps == 0
                with phase("logging"):
                    self.guard.after(self.step, self.model, sinks, logged)
                    if logged:
                        self.tell(sinks, meter, batch, outcome)
                if trouble := self.guard.trouble(self.step, done):
                    rewind.go_back(self, trouble, sinks)
                    return True
                saving.when_due()
                evaluating.when_due()
        return False

    def advance(self, batch: Batch) -> Outcome:
        """One optimizer step."""
        lr = optim.learning_rate(self.run.optim, self.samples, self.total_samples, self.run.train.global_batch)
        terms, features = self.forward_backward(batch)
        with phase("optimizer"):
            norms = self.engine.step(lr, self.run.optim.clip_norm, self.guard.judging(terms, batch))
            if self.average is not None:
                self.average.update(self.model.towers)
        self.step += 1
        return Outcome(terms, features, norms, lr)

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

    @property
    def position(self) -> int:
        """Where the next sample lies in the data order: further than `samples` where some were left out."""
        return left_out.position(self.samples, self.guard.record.left_out)

    @cached_property
    def total_samples(self) -> int:
        """Length of the run, in whole steps."""
        asked = self.run.train.samples or math.ceil((self.run.train.epochs or 0) * len(self.source))
        return math.ceil(asked / self.run.train.global_batch) * self.run.train.global_batch

    @property
    def steps_left(self) -> int:
        """From here to the end of the run."""
        return (self.total_samples - self.samples) // self.run.train.global_batch

    def tell(self, sinks: Sinks, meter: Meter, batch: Batch, outcome: Outcome) -> None:
        """The record of the step just done, means over ranks, to every sink."""
        digest = self.digest(batch) if self.run.log.batch_digest else None
        epoch = self.samples / len(self.source)
        named: dict[str, Any] = {"step": self.step, "epoch": epoch, "samples": self.samples, "batch_digest": digest}
        named |= {"lr": outcome.lr, "guard": self.guard.numbers(outcome.features)}
        sinks.write(meter.record(outcome.report(), **named, sent=self.exchange.sent))
        sinks.skips(meter.take_skips())
        self.skipped = meter.skipped

    def digest(self, batch: Batch) -> str:
        """Hash of the global batch's keys, pixels and tokens; the same for any number of ranks."""
        return combine([row for rows in self.world.share(row_digests(batch)) for row in rows])

    def loader(self) -> Loader:
        """This rank's part of every remaining global batch."""
        spec, window = self.model.image_spec, (self.samples, self.total_samples)
        without = self.guard.record.left_out
        return train_loader(self.run, self.world, spec, self.tokenize, *window, self.source, self.wanted, without)

    def batches(self, loader: Loader, saving: Saving) -> Iterator[tuple[Batch, float]]:
        """Every batch with the seconds waited for it; what stops the data of one rank stops all, with its reason.

        The one vote of a step, which a signal reaches without waiting for a batch.
        """
        batches, waited_s = iter(loader), loader.wait_s
        while self.samples < self.total_samples:
            batch = None
            agreeing = self.world.together("reading data", *saving.questions)
            with agreeing as vote, phase("data"), suppress(Stopped), interruptible():
                batch = next(batches, None)
            saving.heed(vote)
            if batch is None:
                return
            yield batch, loader.wait_s - waited_s
            waited_s = loader.wait_s

    def sinks(self) -> Sinks:
        """Where numbers go; the start itself is an event, with the process that each rank is."""
        with self.world.together("opening the run's files"):
            sinks = open_sinks(self.run, self.world, self.total_samples, self.step, self.samples, self.position)
            if self.world.is_main:
                record.append(self.run.path, record.environment(self.run))
                record.keep_data(self.run.path, self.source.facts, fresh=self.step == 0)
                if self.source.damage and not self.step:
                    sinks.skips(self.source.damage)
                    log.warning("data.train: shards are damaged: %d notes in skips.jsonl", len(self.source.damage))
        sinks.event("start", pids=self.world.share(os.getpid()), **summary.facts(self.summary, self))
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
