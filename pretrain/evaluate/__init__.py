"""What the trained encoders can do, on held-out shards and on all ranks. The file name is the task's name."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pretrain import checkpoint, config, model, named
from pretrain.checkpoint_files import write_anywhere
from pretrain.data.evaluation import eval_loader
from pretrain.data.patterns import expand
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.evaluate.base import Setting, Task
from pretrain.phases import phase
from pretrain.signals import interruptible
from pretrain.watch.watcher import Watch
from pretrain.world import World


def names() -> list[str]:
    """Every built-in task."""
    return named.names(sys.modules[__name__])


def find(name: str) -> Task:
    """The module of a task; UserError where there is none."""
    return cast("Task", named.module(sys.modules[__name__], name))


def evaluate(
    source: str | Path,
    task: str,
    *,
    world: World,
    average: bool | None = None,
    data: tuple[str, ...] = (),
    classes: str | Path | None = None,
    batch_size: int = 256,
    workers: int = 2,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Measure a run's encoders and write RUN/eval/TASK_STEP.json. Collective.

    Args:
        source: run folder (its newest good checkpoint) or checkpoint folder, or the URL of either.
        task: a name of `names()`, or a module with a dot in its name.
        average: whether to take the averaged weights; None: where there are any.
        data: held-out shards; default: the run's data.eval.
        classes: for zero_shot; default: classes.json beside the shards or in the folder above them.
        batch_size: images or texts per rank and forward; changes no result beyond rounding.
        workers: decoding processes per rank.
        watch: keeps its heartbeats in RUN/eval/TASK, unless the run is a URL.

    Returns:
        task, checkpoint, step, average, data, then the metrics; as its errors (UserError), the same on every rank.
    """
    started = time.monotonic()
    with phase("start"), world.together(f"opening {source}"), interruptible():
        method = find(task)
        folder = checkpoint.locate(source)
        average = checkpoint.has_average(folder) if average is None else average
        encoder = model.restore(folder, average, world.device)
        held_out = _held_out(checkpoint.read_run(folder).data, data, workers)
        classes = _classes(classes, held_out)
    with _watched(watch, _run_folder(source, folder), task, world):
        metrics = method.measure(_setting(encoder, held_out, world, batch_size, classes))
    result = _facts(task, folder, average) | {"data": list(held_out.eval), "world_size": world.size} | dict(metrics)
    _save(_run_folder(source, folder), folder, result | {"seconds": round(time.monotonic() - started, 3)}, world)
    return result


def measure(
    encoder: model.DualEncoder,
    task: str,
    held_out: config.Data,
    world: World,
    batch_size: int = 256,
    classes: str | Path | None = None,
) -> dict[str, Any]:
    """The metrics of an encoder that is already here, for instance in training; in evaluation mode meanwhile.

    Collective; arguments, result and errors as with `evaluate`. Writes nothing.
    """
    with world.together(f"preparing {task}"):
        method, found = find(task), _classes(classes, held_out)
    training = encoder.training
    encoder.eval()
    try:
        return dict(method.measure(_setting(encoder, held_out, world, batch_size, found)))
    finally:
        encoder.train(training)


@contextmanager
def _watched(watch: Watch | None, run_folder: checkpoint.Folder, task: str, world: World) -> Iterator[None]:
    if watch is not None and isinstance(run_folder, Path):
        watch.open(run_folder / "eval" / task, world)
    with phase("evaluating", task):
        yield


def _facts(task: str, folder: checkpoint.Folder, average: bool) -> dict[str, Any]:
    return {"task": task, "checkpoint": str(folder), "step": checkpoint.step_of(folder), "average": average}


def _setting(
    encoder: model.DualEncoder, held_out: config.Data, world: World, batch_size: int, classes: Path | None
) -> Setting:
    with world.together("opening the held-out shards"), interruptible():
        tokenize = tokenizer.build(encoder.architecture.name)
        batches = eval_loader(held_out, world, encoder.image_spec, tokenize, batch_size)
    return Setting(encoder, tokenize, batches, world, batch_size, classes)


def _held_out(data: config.Data, override: tuple[str, ...], workers: int) -> config.Data:
    shards = tuple(override) or data.eval
    if data.synthetic is None and not shards:
        raise UserError("data.eval is empty: name held-out shards with --data, or in the run's config")
    return dataclasses.replace(data, eval=shards, workers=workers)


def _classes(given: str | Path | None, data: config.Data) -> Path | None:
    """classes.json as given, or beside the first held-out shard, or in the folder above; None where there is none."""
    if given is not None:
        return Path(given)
    if not data.eval:
        return None
    folder = Path(expand(data.eval, "data.eval")[0]).resolve().parent
    return next((path for path in (folder / "classes.json", folder.parent / "classes.json") if path.is_file()), None)


def _run_folder(source: str | Path, folder: checkpoint.Folder) -> checkpoint.Folder:
    """Where results go: the run folder that was named, or the one around the checkpoint that was."""
    named = checkpoint.folder_of(source)
    return folder.resolve().parent.parent if named == folder else named


def _save(run_folder: checkpoint.Folder, folder: checkpoint.Folder, result: dict[str, Any], world: World) -> None:
    with world.together(f"writing the result of {result['task']}"):
        if world.is_main:
            _write(run_folder, folder, result)


def _write(run_folder: checkpoint.Folder, folder: checkpoint.Folder, result: dict[str, Any]) -> None:
    # A result of the plain weights must not hide the one of their average.
    plain = "_plain" if checkpoint.has_average(folder) and not result["average"] else ""
    name = f"{result['task']}_{result['step']:08d}{plain}.json"
    write_anywhere(run_folder / "eval" / name, json.dumps(result, indent=1) + "\n")
