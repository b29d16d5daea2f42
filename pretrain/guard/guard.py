"""Watches over a run: leaves out steps that would harm it, compares its ranks, and says when it must go back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.config import Run
from pretrain.data import left_out
from pretrain.errors import RunFailed
from pretrain.guard import geometry, hashes
from pretrain.guard.judge import Judge, Verdict
from pretrain.guard.record import LOOK, Record, Trouble
from pretrain.model import DualEncoder
from pretrain.sinks import Sinks
from pretrain.values import Batch, Features, GradNorms, Terms
from pretrain.world import World

log = logging.getLogger(__name__)

KEYS = 256
"""Keys of samples that an event holds; of larger batches a file of their own has them all."""


class Guard:
    """Of one run, on this rank. Every rank makes the same calls at the same steps."""

    def __init__(self, run: Run, world: World) -> None:
        self._options, self._world, self._batch = run.guard, world, run.train.global_batch
        self._judge = Judge(run.guard.spikes, world)
        self.record = Record()
        self.weights_hash: str | None = None
        """Of the weights after the step just done, where ranks were compared."""
        self._keys: list[tuple[str, ...]] = []

    def judging(self, terms: Terms, batch: Batch) -> Callable[[GradNorms], Tensor]:
        """For `Engine.step`: whether this batch may move the weights. Collective when it is called."""
        self._keys.append(batch.keys)
        return self._judge.of(torch.stack([term.detach() for term in terms.values()]).sum())

    def after(self, step: int, model: DualEncoder, sinks: Sinks, due: bool) -> None:
        """A step is done.

        Args:
            due: numbers are read back from the device now anyway.

        Raises:
            RunFailed: on every rank: ranks that must hold the same weights do not.
        """
        if due or step % LOOK == 0:
            self.look(step, sinks)
        every = self._options.compare_steps
        self.weights_hash = self._compare(step, every, model, sinks) if every and step % every == 0 else None

    def look(self, step: int, sinks: Sinks) -> None:
        """Learn what became of the steps up to this one, and write down those that were left out."""
        verdicts, keys = self._judge.verdicts(), self._keys
        self._keys, first = [], step - len(verdicts) + 1
        skipped = [n for n, verdict in enumerate(verdicts) if verdict.reason]
        for n in skipped:
            self._write(first + n, verdicts[n], keys[n], sinks)
        if skipped and self._world.is_main:
            _say(len(skipped), first + skipped[0], verdicts[skipped[0]])
        self.record.add(step, [first + n for n in skipped])

    def numbers(self, features: Features) -> dict[str, Any]:
        """Its part of the record of the step just done. Collective."""
        figures = geometry.measure(features, self._world)
        counts = {"steps_skipped": self.record.skipped, "rewinds": self.record.rewinds}
        return counts | {"geometry": figures, "weights_hash": self.weights_hash}

    def trouble(self, step: int, done: bool) -> Trouble | None:
        """Whether the run must go back now."""
        return self.record.trouble(step, self._options.patience, done)

    def state(self) -> dict[str, Tensor]:
        """Tensors that belong to a checkpoint, beside `record.facts()`; `look` comes first."""
        return self._judge.state()

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take back what `state` and `record.facts` gave."""
        self._judge.load(tensors)
        self.record.load(facts)
        self._keys, self.weights_hash = [], None

    def _write(self, step: int, verdict: Verdict, keys: tuple[str, ...], sinks: Sinks) -> None:
        start = left_out.position((step - 1) * self._batch, self.record.left_out)
        everyone = [key for part in self._world.share(keys) for key in part]
        place: dict[str, Any] = {"samples": [start, start + self._batch], "keys": everyone[:KEYS]}
        if len(everyone) > KEYS:
            place["all_keys"] = f"skipped/samples_{start:012d}.txt"
            sinks.listing(place["all_keys"], everyone)
        sinks.event("step_skipped", step=step, reason=verdict.reason, **vars(verdict), **place)

    def _compare(self, step: int, every: int, model: DualEncoder, sinks: Sinks) -> str | None:
        named = hashes.comparable(model.towers)
        if not named:
            return None
        found, difference = hashes.compare(hashes.parts(named), self._world)
        if difference is None:
            return found
        sinks.event("weights_differ", step=step, parameter=difference.name, ranks=difference.ranks)
        raise RunFailed(
            f"after step {step} {difference}: a machine has computed or copied wrongly; this step was not saved; "
            f"remove checkpoints after step {step - every}, which may hold it, and start again without that machine"
        )


def _say(count: int, step: int, verdict: Verdict) -> None:
    """One line, however many steps were left out since the last one."""
    steps = f"step {step} was" if count == 1 else f"{count} steps from step {step} on were"
    numbers = f"loss {verdict.loss:.4g} (limit {verdict.max_loss:.4g})"
    numbers += f", gradient norm {verdict.grad_norm:.4g} (limit {verdict.max_grad_norm:.4g})"
    log.warning("%s left out, %s: %s; events.jsonl has the samples", steps, verdict.reason, numbers)
