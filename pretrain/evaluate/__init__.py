"""What the trained encoders can do, on held-out samples and on all ranks. The file name is the task's name."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pretrain import checkpoint, config, model, named
from pretrain.checkpoint_files import write_anywhere
from pretrain.data.held_out import entries
from pretrain.data.patterns import expand
from pretrain.data.rows import Tokenize
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.evaluate.base import Setting, Task
from pretrain.evaluate.base.cache import Cache, identity_of
from pretrain.evaluate.base.samples import Opener, Samples, kind_of
from pretrain.evaluate.base.sources import Opened, open_source
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


@dataclass(frozen=True)
class How:
    """What an evaluation is told beside the encoders and the held-out data."""

    train: tuple[str, ...] = ()
    """Samples that probes learn from; none: the run's data.train."""
    classes: str | Path | None = None
    """As `classes.choose` takes it; None: classes.json beside the first entry or in the folder above it."""
    templates: str | None = None
    """As `classes.choose` takes it."""
    batch_size: int = 256
    """Images or texts per rank and forward; changes no result beyond rounding."""
    cache: Path | None = None
    """Folder that ranks share, for class and image features."""


def evaluate(
    source: str | Path,
    task: str,
    *,
    world: World,
    average: bool | None = None,
    data: tuple[str, ...] = (),
    workers: int = 2,
    out: Path | None = None,
    watch: Watch | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Measure encoders; of a run, RUN/eval/TASK_STEP.json is written. Collective.

    Args:
        source: what `sources.open_source` takes: a run, a checkpoint, an open_clip or a transformers folder.
        task: a name of `names()`, or a module with a dot in its name.
        average: whether to take the averaged weights; None: where there are any.
        data: held-out shards, a folder of class folders, or annotation files; default: the run's data.eval.
        workers: decoding processes per rank.
        out: the result's file in place of the run's own.
        watch: keeps its heartbeats in RUN/eval/TASK, unless the run is a URL.
        how: fields of `How`.

    Returns:
        task, checkpoint, step, average, data, then the metrics; as its errors (UserError), the same on every rank.
    """
    started, asked, method = time.monotonic(), How(**how), find(task)
    with phase("start"), world.together(f"opening {source}"), interruptible():
        opened = open_source(source, average, world.device)
        held_out = _held_out(opened.data, data, workers)
    with _watched(watch, opened.folder, task, world):
        setting, samples = _setting(opened.encoder, opened.tokenize, method, task, held_out, world, asked)
        metrics = method.measure(setting)
    facts = opened.facts | {"data": list(samples.names), "world_size": world.size}
    result = {"task": task} | facts | dict(metrics)
    path = out or (opened.folder / "eval" / _name(result, opened) if opened.folder is not None else None)
    if path is not None:
        save(path, result | {"seconds": round(time.monotonic() - started, 3)}, world)
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
        method, tokenize = find(task), tokenizer.build(encoder.architecture.name)
        held_out = dataclasses.replace(held_out, eval=entries(held_out))
    training = encoder.training
    encoder.eval()
    try:
        how = How(classes=classes, batch_size=batch_size)
        setting, _ = _setting(encoder, tokenize, method, task, held_out, world, how)
        return dict(method.measure(setting))
    finally:
        encoder.train(training)


def check(encoder: model.DualEncoder, task: str, held_out: config.Data, world: World) -> None:
    """Whether `measure` has what it needs, as far as that shows without encoding anything. Collective. Raises alike."""
    with world.together(f"preparing {task}"):
        method, tokenize = find(task), tokenizer.build(encoder.architecture.name)
    _setting(encoder, tokenize, method, task, held_out, world, How())


def save(path: checkpoint.Folder, result: dict[str, Any], world: World) -> None:
    """Write a result, by rank 0. Collective. UserError where the disk is full or failing."""
    with world.together(f"writing the result of {result['task']}"):
        if world.is_main:
            write_anywhere(path, json.dumps(result, indent=1) + "\n")


@contextmanager
def _watched(watch: Watch | None, run_folder: checkpoint.Folder | None, task: str, world: World) -> Iterator[None]:
    if watch is not None and isinstance(run_folder, Path):
        watch.open(run_folder / "eval" / task, world)
    with phase("evaluating", task):
        yield


def _setting(
    encoder: model.DualEncoder,
    tokenize: Tokenize,
    method: Task,
    task: str,
    held_out: config.Data,
    world: World,
    how: How,
) -> tuple[Setting, Samples]:
    opener = Opener(world, encoder.image_spec, tokenize, how.batch_size)
    with world.together("opening the held-out samples"), interruptible():
        samples = opener.open(held_out, getattr(method, "READS", ("shards",)), task)
        train = _train(opener, held_out, how, task) if getattr(method, "LEARNS", False) else None
        kept = Cache(how.cache, _identity(encoder, tokenize) if how.cache else "", world)
        classes = _classes(how.classes, samples.names)
    setting = Setting(
        encoder, tokenize, samples.batches, world, how.batch_size, classes, how.templates, samples.folders,
        train, samples.records, samples.left_out, kept,
    )  # fmt: skip
    return setting, samples


def _train(opener: Opener, held_out: config.Data, how: How, task: str) -> Any:
    learned = how.train or held_out.train
    if not learned:
        raise UserError(f"{task} learns from labelled samples: name them with --train")
    return opener.open(dataclasses.replace(held_out, eval=learned), ("shards", "folders"), task).batches


def _held_out(data: config.Data, override: tuple[str, ...], workers: int) -> config.Data:
    named = tuple(override) or entries(data)
    if data.synthetic is None and not named:
        raise UserError("data.eval is empty: name held-out shards with --data, or in the run's config")
    return dataclasses.replace(data, eval=named, workers=workers)


def _classes(given: str | Path | None, named: tuple[str, ...]) -> str | Path | None:
    """As given, or classes.json beside the first held-out entry, or in the folder above; None where there is none."""
    if given is not None:
        return given
    if not named:
        return None
    first = Path(named[0]).expanduser()
    folder = first.resolve() if kind_of(named[0]) == "folders" else _shard_folder(named)
    return next((path for path in (folder / "classes.json", folder.parent / "classes.json") if path.is_file()), None)


def _shard_folder(named: tuple[str, ...]) -> Path:
    first = named[0] if kind_of(named[0]) != "shards" else expand(named, "data.eval")[0]
    return Path(first).resolve().parent


def _identity(encoder: model.DualEncoder, tokenize: Tokenize) -> str:
    probe = tokenize(list(tokenizer.PROBE)).tolist()
    return identity_of(encoder.towers, encoder.architecture.preprocess, encoder.precision, probe)


def _name(result: dict[str, Any], opened: Opened) -> str:
    """TASK_STEP.json; a result of the plain weights must not hide the one of their average."""
    located = checkpoint.folder_of(opened.facts["checkpoint"])
    plain = "_plain" if checkpoint.has_average(located) and not result["average"] else ""
    return f"{result['task']}_{result['step']:08d}{plain}.json"
