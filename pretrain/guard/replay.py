"""A step of the past once more, from the checkpoint before it: does the machine still compute what it computed then?

Nothing is written into the run folder. On the same kind of machine, the same number of ranks and the same versions,
every number must be equal bit for bit.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pretrain import checkpoint, checks, runfile, snapshot
from pretrain.checkpoint import Folder
from pretrain.checks import check_world
from pretrain.config import Run
from pretrain.errors import RunFailed, UserError
from pretrain.guard import hashes, past
from pretrain.guard.past import Past
from pretrain.metrics import Meter
from pretrain.signals import interruptible
from pretrain.sinks import Sinks
from pretrain.train import Training, use_threads
from pretrain.world import join


def replay(run: Run, step: int) -> None:
    """Run up to a step again, print what is equal, on all ranks that were started.

    Raises:
        UserError: the run is being trained, is another one, or nothing is known of the step, or of one before it.
        RunFailed: on every rank: some number differs.
    """
    with join(run.train.timeout_s) as world:
        check_world(run, world.size)
        use_threads(run)
        with world.together("reading the run folder"):
            if world.is_main:
                _refuse(run)
        homes = list(dict.fromkeys([checkpoint.home(run), run.path]))
        found = checkpoint.newest(homes, world, before=step)
        if found is None:
            raise UserError(f"--replay {step}: {_what_is_left(homes)}; checkpoint.milestone_steps keeps some for ever")
        training = Training(run, world, checkpoint.read_facts(found))
        known = _past(training, homes, step)
        recorded = known.numbers
        snapshot.put_back(training, found)
        training.guard.record.went(known.guard)
        rows = list(_rows(recorded, _again(training, step, bool(recorded.get("batch_digest")))))
        if world.is_main:
            _show(rows, found)
        if different := [name for name, one, other in rows if one != other]:
            raise RunFailed(
                f"--replay {step}: {', '.join(different)} came out otherwise than recorded: on other hardware, ranks "
                "or versions to be expected, else the run or this machine has computed wrongly"
            )


def _refuse(run: Run) -> None:
    """Refuse a run that is being trained, and one that is none."""
    path = run.path / "config.yaml"
    if not path.exists():
        raise UserError(f"--replay: {run.path} holds no run; name and folder say where it is")
    if changed := checks.changes(runfile.load(path, []), run):
        raise UserError(f"--replay: {run.path} belongs to a run with another config ({'; '.join(changed)})")
    with (run.path / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"--replay: {run.path} is being trained by {file.read().strip()}: stop that") from None


def _past(training: Training, homes: list[Folder], step: int) -> Past:
    """What is known of a step. Collective."""
    world, found = training.world, Past({}, {})
    with world.together("reading what was recorded"):
        if world.is_main:
            found = past.of(training.run.path, homes, step, list(hashes.comparable(training.model.towers)))
    shared: Past = world.share(found)[0]
    return shared


def _again(training: Training, step: int, digest: bool) -> dict[str, Any]:
    """The record of a step that is done now. Collective."""
    silent, rows = Sinks({}, []), training.run.train.global_batch
    with training.loader() as loader, Meter(training.world, training.skipped) as meter:
        batches = iter(loader)
        while True:
            batch = None
            with training.world.together("reading data"), interruptible():
                batch = next(batches, None)
            if batch is None:
                raise UserError(f"--replay {step}: the run ends after step {training.step}")
            outcome = training.advance(batch)
            training.guard.after(training.step, training.model, silent, training.step == step)
            meter.step(rows)
            if training.step == step:
                guard = training.guard.numbers(outcome.features) | {"weights_hash": _hash(training)}
                record = meter.record(
                    outcome.report(), step=step, epoch=0.0, samples=training.samples, lr=outcome.lr, guard=guard
                )
                return record | {"batch_digest": training.digest(batch) if digest else None}


def _hash(training: Training) -> str | None:
    named = hashes.comparable(training.model.towers)
    return hashes.compare(hashes.parts(named), training.world)[0] if named else None


def _rows(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, then, now) of every number that was recorded."""
    for name, value in recorded.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", part, _as_recorded(again[name].get(key))) for key, part in value.items())
        else:
            yield name, value, _as_recorded(again[name])


def _as_recorded(value: Any) -> Any:
    """JSON has no word for what is not finite: a step that was left out for that is the same again."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(rows: list[tuple[str, Any, Any]], found: Folder) -> None:
    print(f"from {found}")
    table = [("", "recorded", "now", ""), *((n, f"{a}", f"{b}", "equal" if a == b else "DIFFERS") for n, a, b in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def _what_is_left(homes: list[Folder]) -> str:
    steps = sorted({checkpoint.step_of(folder) for folder in checkpoint.whole_checkpoints(homes)})
    left = f"those left are of steps {', '.join(map(str, steps))}" if steps else "none is left"
    return f"no checkpoint of an earlier step is there, {left}"
