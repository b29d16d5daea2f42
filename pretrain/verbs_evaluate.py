"""`pretrain evaluate`: what encoders can do, of a run or of another library's folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from pretrain import flags
from pretrain.errors import UserError
from pretrain.show import show

Average = Literal["auto", "yes", "no"]
AVERAGE: dict[Average, bool | None] = {"auto": None, "yes": True, "no": False}
LONG = ("per_class", "per_group")
"""Left out of the table; the result's file and --json have them."""


def evaluate(args: list[str]) -> None:
    """`pretrain evaluate RUN --task ...`, alone or under torchrun; a signal ends it with 85, and nothing is lost."""
    from pretrain.signals import armed
    from pretrain.verbs_drill import faults

    with armed(), faults():
        flags.command(_evaluate, args, "pretrain evaluate")


def _evaluate(
    source: Positional[str],
    /,
    *,
    task: str,
    data: tuple[str, ...] = (),
    train: tuple[str, ...] = (),
    classes: str | None = None,
    templates: str | None = None,
    average: Average = "auto",
    batch_size: int = 256,
    workers: int = 2,
    cache: Path | None = None,
    out: Path | None = None,
    timeout_s: float = 600.0,
    json: bool = False,
) -> None:
    """Measure the encoders of a run, or of an open_clip or transformers folder, on all ranks that were started.

    Args:
        source: Run folder, checkpoint folder, or a folder with open_clip_config.json or transformers' config.json.
        task: zero_shot, retrieval, linear_probe, few_shot, composition, conditional, geometry, or a module of yours.
        data: Held-out shards, a folder of class folders, or JSON files of benchmarks; default: the run's data.eval.
        train: For linear_probe and few_shot, labelled samples to learn from; default: the run's data.train.
        classes: For zero_shot, a classes.json, a file of names, 'imagenet', or 'folders'; default: classes.json above
            the samples.
        templates: For zero_shot, a file of prompts with {} for the name, 'openai' or 'simple'; default: classes.json's.
        average: Use the averaged (EMA) weights; auto: where there are any.
        batch_size: Pairs per rank and forward.
        workers: Decoding processes per rank.
        cache: Folder that keeps features of classes and images for the next evaluation of the same weights.
        out: File for the result; default: RUN/eval/TASK_STEP.json, and none for a folder that is no run.
        timeout_s: Seconds that ranks wait for each other; none may give no sign for six times as long.
        json: Print one JSON object instead of a table.
    """
    how: dict[str, Any] = {"data": data, "train": train, "classes": classes, "templates": templates}
    how |= {"batch_size": batch_size, "workers": workers, "cache": cache, "out": out, "average": AVERAGE[average]}
    result = _on_all_ranks(source, task, how, timeout_s)
    if result is not None:
        show(result if json else {key: value for key, value in result.items() if key not in LONG}, json)


def _on_all_ranks(source: str, task: str, how: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
    """The result, on rank 0."""
    from pretrain.evaluate import evaluate
    from pretrain.signals import armed, interruptible
    from pretrain.watch.watcher import watching_ranks
    from pretrain.world import join

    if not 0 < timeout_s < float("inf"):
        raise UserError(f"--timeout-s {timeout_s} must be a positive number of seconds, 600 for instance")
    with armed() as stop, watching_ranks(timeout_s) as watch, join(timeout_s) as world, interruptible(world.size == 1):
        if watch is not None:
            stop.before_leaving = watch.end
        result = partial(evaluate, source, task, world=world, watch=watch)(**how)
        return result if world.is_main else None
