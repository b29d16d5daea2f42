"""How a run scales: the same batch on more GPUs, and a batch that grows with them."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import UserError
from pretrain.plan.case import Question
from pretrain.plan.predict import Prediction, largest_micro_batch, predict

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Point:
    """One number of GPUs."""

    prediction: Prediction
    efficiency: float
    """Samples a second and GPU, as a share of the best point's."""
    gpu_hours: float | None
    """Of the whole run."""


def same_batch(ask: Question) -> list[Point]:
    """`train.global_batch` held: GPUs get fewer pairs each, down to one."""
    batch = ask.run.train.global_batch
    return _points(ask, [ask.with_run(gpus=gpus) for gpus in SIZES if batch % gpus == 0])


def same_share(ask: Question) -> list[Point]:
    """Pairs per GPU held: the batch grows, and the loss with its square."""
    return _points(ask, [ask.with_run(gpus=gpus, global_batch=gpus * ask.rows) for gpus in SIZES])


def _points(ask: Question, asked: list[Question]) -> list[Point]:
    found = [predict(_fitting(one)) for one in asked if _carries(one)]
    found = [one for one in found if one.fits]
    if not found:
        return []
    best, samples = max(one.samples_per_s / one.gpus for one in found), ask.run.train.samples
    return [
        Point(one, one.samples_per_s / one.gpus / best, samples and samples / one.samples_per_s * one.gpus / 3600)
        for one in found
    ]


def _fitting(ask: Question) -> Question:
    """With the config's pass, or the largest one that fits."""
    return ask if predict(ask).fits else ask.with_run(micro_batch=largest_micro_batch(ask) or 1)


def _carries(ask: Question) -> bool:
    try:
        predict(ask)
    except UserError:
        return False
    return True
