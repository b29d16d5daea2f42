"""When a run saves, and when it ends early: decided alike on every rank, by what all know or by the step's one vote."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrain import runfile, snapshot
from pretrain.errors import Stopped
from pretrain.metrics import Meter
from pretrain.signals import StopRequest
from pretrain.sinks import Sinks
from pretrain.world import Vote

if TYPE_CHECKING:
    from pretrain.train import Training


class Saving:
    """The checkpoints of a stretch of a run."""

    def __init__(self, training: Training, stop: StopRequest, sinks: Sinks, meter: Meter) -> None:
        self._training, self._stop, self._sinks, self._meter = training, stop, sinks, meter

    @property
    def questions(self) -> tuple[Callable[[], bool], ...]:
        """What `heed` needs an answer to, of every rank."""
        return self._stop.asked, self._is_late, lambda: self._training.saver.failed

    def heed(self, vote: Vote) -> None:
        """Save, or save and end, because of what some rank has said before a step.

        Raises:
            Stopped: on every rank, a signal came to some rank, and the steps done are on disk.
            UserError: on every rank, a checkpoint could not be written.
        """
        (stopping, late, failed), training = vote.answers, self._training
        self._stop.nothing_to_lose &= training.step == training.began_at
        if failed:
            training.saver.wait()  # raises on every rank
        if stopping or late:
            self._save(wait=stopping)
        if stopping:
            self._tell()
            self._sinks.event("stopped", step=training.step, signal=self._stop.received)
            raise Stopped(self._stopped())

    def when_due(self) -> None:
        """A checkpoint every so many steps, and at the end."""
        training = self._training
        every, done = training.run.checkpoint.every_steps, training.samples == training.total_samples
        if done or (every is not None and training.step % every == 0):
            self._save(wait=done)
        self._tell()

    def _save(self, wait: bool) -> None:
        """A checkpoint of this moment, written in the background; older ones are pruned once it is safe on disk.

        Args:
            wait: return when it is.
        """
        training = self._training
        with self._meter.clock.paused():
            if training.step != training.saved_step:
                self._sinks.skips(self._meter.take_skips())
                training.skipped = self._meter.skipped
                training.guard.look(training.step, self._sinks)
                config_text, before = runfile.dump(training.run), training.guard.record.first
                training.saver.save(lambda: snapshot.take(training), config_text, before)
            training.saved_at, training.saved_step = time.monotonic(), training.step
            if wait:
                training.saver.wait()

    def _tell(self) -> None:
        for saved in self._training.saver.finished():
            self._sinks.event("saved", **saved)

    def _is_late(self) -> bool:
        minutes = self._training.run.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._training.saved_at >= 60 * minutes

    def _stopped(self) -> str:
        came, step = self._stop.received or "a signal to another rank", self._training.step
        if step == self._training.began_at:
            return f"{came} came: there was nothing new to save, start again to go on"
        return f"{came} came: saved after step {step}, start again to go on"
