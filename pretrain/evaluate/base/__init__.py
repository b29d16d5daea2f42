"""What an evaluation gets, and what it gives back. One file per task; its `measure` is found by the file's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.data.evaluation import EvalBatch
from pretrain.evaluate.base.cache import Cache
from pretrain.model import DualEncoder
from pretrain.phases import phase
from pretrain.world import World

Tokenize = Callable[[list[str]], Tensor]
"""Texts -> [B, L] int64."""


@dataclass(frozen=True)
class Setting:
    """Everything an evaluation needs on this rank."""

    model: DualEncoder
    tokenize: Tokenize
    batches: Iterable[EvalBatch]
    """This rank's part of the held-out samples; may be empty."""
    world: World
    batch_size: int = 256
    """Texts per forward."""
    classes: Path | str | None = None
    """classes.json or what else `classes.choose` takes, for tasks that need class names."""
    templates: str | None = None
    """For tasks that need prompts, as `classes.choose` takes it."""
    folders: Sequence[str] | None = None
    """Names of the class folders that the samples lie in, by label; None: they lie in none."""
    train: Iterable[EvalBatch] | None = None
    """This rank's part of labelled samples to learn from, for tasks that do."""
    records: Sequence[Any] = ()
    """What annotation files say of the samples; see `published.Annotated`."""
    left_out: int = 0
    """Records that the benchmark's own protocol leaves out."""
    kept: Cache | None = field(default=None, repr=False)
    """Features that were computed before."""

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.architecture.towers["embed_dim"])

    @property
    def cache(self) -> Cache:
        """Features that were computed before; one without a folder where none was named."""
        return self.kept or Cache(None, "", self.world)

    def images(self, batch: EvalBatch) -> Tensor:
        """Features of a batch's images, [B, D] on the world's device."""
        with phase("evaluating", "images"):
            return self.model.encode_image(batch.images.to(self.world.device))

    def texts(self, texts: list[str]) -> Tensor:
        """Features of texts, [len(texts), D] on the world's device."""
        parts = [self._encoded(part) for part in split(texts, self.batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, self.width, device=self.world.device)

    def _encoded(self, texts: list[str]) -> Tensor:
        with phase("evaluating", "texts"):
            return self.model.encode_text(self.tokenize(texts).to(self.world.device))

    def share(self, total: int) -> range:
        """This rank's consecutive part of `total` things."""
        rank, size = self.world.rank, self.world.size
        return range(rank * total // size, (rank + 1) * total // size)


class Task(Protocol):
    """A module of this package."""

    READS: Sequence[str]
    """Kinds of held-out data that it takes: see `samples.KINDS`. With LEARNS = True it gets `Setting.train` too."""

    @staticmethod
    def measure(setting: Setting) -> Mapping[str, Any]:
        """Metrics by name, the same on every rank; every rank calls it."""
        ...


def split(items: list[str], size: int) -> Iterator[list[str]]:
    """Consecutive parts of `size`, the last possibly smaller."""
    return (items[start : start + size] for start in range(0, len(items), size))
