"""What is embedded by what, and how."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pretrain.config import Data
from pretrain.data import patterns, storage
from pretrain.data.shards.reader import ShardSource
from pretrain.data.storage import is_local
from pretrain.errors import UserError
from pretrain.evaluate.base.sources import Opened, open_source
from pretrain.search import store
from pretrain.world import World

Tower = Literal["both", "image", "text"]
DType = Literal["fp16", "fp32"]


@dataclass(frozen=True)
class How:
    """What an embedding is told beside model, data and place."""

    tower: Tower = "both"
    dtype: DType = "fp16"
    """Of the numbers on the disk; the arithmetic is the model's."""
    average: bool | None = None
    """Whether to take a run's averaged weights; None: where there are any."""
    batch_size: int = 256
    """Images, and texts, per rank and forward; changes no result beyond rounding."""
    workers: int = 2
    """Decoding processes per rank."""

    def __post_init__(self) -> None:
        if self.tower not in ("both", *store.TOWERS):
            raise UserError(f"tower {self.tower!r} must be both, image or text")
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size} must be at least 1")
        if self.workers < 0:
            raise UserError(f"workers {self.workers} must be at least 0; with 0 the rank decodes by itself")

    @property
    def towers(self) -> tuple[str, ...]:
        return store.TOWERS if self.tower == "both" else (self.tower,)

    @property
    def stored(self) -> type[np.floating[Any]]:
        """The type of the numbers on the disk."""
        return np.float16 if self.dtype == "fp16" else np.float32


@dataclass(frozen=True)
class Job:
    """A model and the shards that it embeds."""

    opened: Opened
    source: ShardSource
    data: Data
    how: How

    @cached_property
    def width(self) -> int:
        """D."""
        return int(self.opened.encoder.architecture.towers["embed_dim"])

    @cached_property
    def first(self) -> list[int]:
        """Number of each shard's first sample, and of all samples."""
        return list(itertools.accumulate(self.source.counts, initial=0))

    def places(self, shard: int) -> list[range]:
        """The sample numbers of each batch of a shard."""
        start, stop, size = self.first[shard], self.first[shard + 1], self.how.batch_size
        return [range(at, min(at + size, stop)) for at in range(start, stop, size)]


def open_job(source: str | Path, shards: Sequence[str], world: World, how: How) -> Job:
    """Load the model onto the world's device, and open the shards.

    Raises:
        UserError: one of them cannot be read.
    """
    opened = open_source(source, how.average, world.device)
    data = dataclasses.replace(opened.data, workers=how.workers, sizes=None, weights=())
    reads = storage.make(data)
    named = patterns.expand(shards, "shards", reads)
    paths = [str(Path(path).absolute()) if is_local(path) else path for path in named]
    start = world.rank * len(paths) // world.size
    return Job(opened, ShardSource(paths, data, reads, start, field="shards"), data, how)
