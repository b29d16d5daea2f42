"""Small runs in this process, some of whose batches are poisoned by their place in the data order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import runfile, train
from pretrain.config import Run
from pretrain.signals import StopRequest
from pretrain.values import Batch

ROOT = Path(__file__).resolve().parents[2]
BATCH = 8


def a_run(folder: Path, steps: int = 64, *flags: object) -> Run:
    words = ["--folder", folder, "--data.train", "synthetic:256", "--train.samples", steps * BATCH]
    words += ["--train.global-batch", BATCH, "--checkpoint.every-steps", 8, "--checkpoint.keep-last", 20]
    words += ["--log.every-steps", 4, "--optim.lr", "1e-4", *flags]
    return runfile.load(ROOT / "configs" / "debug.yaml", [str(word) for word in words])


def run(found: Run) -> None:
    train.train(found, StopRequest())


class Killed(BaseException):
    """What ends a run as a kill would: nothing after it is done."""


def poison(patch: pytest.MonkeyPatch, bad: Mapping[int, float], kill_at: int | None = None) -> None:
    """Multiply loss and gradients of batches, by their number in the data order; end the run before a step."""
    original: Callable[[train.Training, Batch], Any] = train.Training.forward_backward

    def spoiled(training: train.Training, batch: Batch) -> Any:
        if training.step + 1 == kill_at:
            training.saver.wait()
            raise Killed
        number = training.position // BATCH
        terms, features = original(training, batch)
        if (factor := bad.get(number)) is not None:
            terms = {name: term * factor for name, term in terms.items()}
            for param in training.model.towers.parameters():
                if param.grad is not None:
                    param.grad.mul_(factor)
        return terms, features

    patch.setattr(train.Training, "forward_backward", spoiled)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "debug" / name).read_text().splitlines()]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(folder, "events.jsonl") if event["event"] == kind]


def tensors(folder: Path, step: int) -> dict[str, bytes]:
    checkpoint = folder / "debug" / "checkpoints" / f"step_{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(checkpoint.rglob("*.safetensors"))}


def keys_of(folder: Path) -> torch.Tensor:
    """Losses of the logged steps."""
    return torch.tensor([line["loss"] for line in lines(folder, "metrics.jsonl")])
