"""Going back: to the checkpoint before the trouble, and on without the batches in which it was.

Nothing is written but what the next checkpoint holds. A run that is killed after it has gone back, and before it saves,
goes on from the same checkpoint, meets the same trouble, and goes back again in the same way.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pretrain import checkpoint, snapshot
from pretrain.checkpoints import places
from pretrain.data import left_out, order
from pretrain.data.left_out import Stretch
from pretrain.errors import RunFailed, UserError
from pretrain.guard.record import Trouble
from pretrain.sinks import Sinks

if TYPE_CHECKING:
    from pretrain.train import Training

log = logging.getLogger(__name__)


def go_back(training: Training, trouble: Trouble, sinks: Sinks) -> None:
    """Put a run into the state of its last good checkpoint before a trouble, and leave the offending samples out.

    Collective.

    Raises:
        RunFailed: on every rank: the run has gone back as often as it may.
        UserError: on every rank: there is no checkpoint before the trouble.
    """
    record, world, now = training.guard.record, training.world, training.step
    if record.rewinds >= training.run.guard.rewinds:
        raise RunFailed(_exhausted(training, trouble))
    training.saver.wait()
    found = checkpoint.newest(training.homes, world, before=trouble.steps[0])
    if found is None:
        raise UserError(_nowhere(training, trouble))
    stretch = trouble.stretch(training.run.train.global_batch, record.left_out)
    facts: dict[str, Any] = {"step": now, "to": checkpoint.step_of(found)}
    facts |= {"steps_skipped": trouble.steps, "left_out": stretch}
    rewinds, stretches = record.rewinds + 1, left_out.merged((*record.left_out, stretch))
    facts |= {"rewinds": rewinds, "all_left_out": stretches}
    sinks.event("rewound", **facts, shards=_shards(training, trouble))
    if world.is_main:
        log.warning("the run goes back from step %d to %d and leaves out samples %d to %d", now, facts["to"], *stretch)
    _drop_later(training, checkpoint.step_of(found))
    snapshot.put_back(training, found)
    record.went({"rewinds": rewinds, "left_out": stretches})


def _drop_later(training: Training, step: int) -> None:
    """Remove the checkpoints after a step: another start would go on from them, as if nothing had been left out."""
    with training.world.together("removing the checkpoints of the trouble"):
        for home in training.homes if training.world.is_main else ():
            place = places.of(home / "checkpoints")
            for later, folder in place.listed().items():
                if later > step:
                    place.remove(folder)


def _shards(training: Training, trouble: Trouble) -> list[str]:
    """Those that the batches left out were read from, where nothing was replaced in them."""
    if not training.world.is_main:
        return []
    source, batch = training.source, training.run.train.global_batch
    samples, left = order.of(source, training.run.seed, training.run.data), training.guard.record.left_out
    starts = [left_out.position((step - 1) * batch, left) for step in trouble.steps]
    numbers = {samples.number(place) for start in starts for place in range(start, start + batch)}
    return sorted({source.key(number).rpartition("/")[0] for number in numbers})


def _exhausted(training: Training, trouble: Trouble) -> str:
    options, record = training.run.guard, training.guard.record
    tried = f"it has gone back {record.rewinds} times, and left out samples {_told(record.left_out)}"
    return (
        f"guard.rewinds {options.rewinds}: {_skipped(trouble)}, and "
        + (tried if record.rewinds else "may not go back")
        + "; events.jsonl names the batches; lower optim.lr, warm up longer or set optim.clip_norm under another name, "
        "or raise guard.rewinds and start again"
    )


def _nowhere(training: Training, trouble: Trouble) -> str:
    return (
        f"optim.lr {training.run.optim.lr}: {_skipped(trouble)}, and there is no checkpoint of an earlier step to go "
        f"back to; lower the rate, warm up longer or set optim.clip_norm under another name, or "
        "save more often"
    )


def _skipped(trouble: Trouble) -> str:
    steps = ", ".join(map(str, trouble.steps[:5])) + (", ..." if len(trouble.steps) > 5 else "")
    return f"by step {trouble.step} the run had left out {len(trouble.steps)} steps of the last 128 ({steps})"


def _told(stretches: tuple[Stretch, ...]) -> str:
    return ", ".join(f"{start} to {stop}" for start, stop in stretches)
