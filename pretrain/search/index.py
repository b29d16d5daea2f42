"""Features that are stored, read in blocks: the files are mapped into memory, so only what is looked at is there."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.search import store

BLOCK = 1 << 15
"""Rows that are looked at together: 64 MiB of fp32 for 512 dimensions."""


@dataclass(frozen=True)
class Entry:
    """What a row of features is of."""

    shard: int
    """Number in the list of shards."""
    sample: int
    """Number of the sample in its shard."""
    key: str
    """`shard/key`."""
    texts: list[str]
    """The captions of an image, or the text itself."""


@dataclass(frozen=True)
class Index:
    """The features of one tower; rows are numbered through all parts, in the order of the shards."""

    folder: Path
    tower: str
    meta: dict[str, Any]
    parts: list[store.Part]

    @cached_property
    def first(self) -> list[int]:
        """Row that each part begins with, and the number of rows."""
        return [0, *itertools.accumulate(part.rows[self.tower] for part in self.parts)]

    def __len__(self) -> int:
        return self.first[-1]

    @property
    def width(self) -> int:
        """D."""
        return int(self.meta["dimensions"])

    @property
    def missing(self) -> int:
        """Shards that are not embedded yet."""
        return len([shard for shard in self.meta["shards"] if shard["samples"]]) - len(self.parts)

    def blocks(self, rows: int = BLOCK) -> Iterator[tuple[int, Tensor]]:
        """(first row, [<= rows, D] fp32 on the CPU): everything once, in order.

        Raises:
            UserError: a file is damaged.
        """
        for part, first in zip(self.parts, self.first, strict=False):
            features = self._features(part)
            for start in range(0, len(features), rows):
                block = np.array(features[start : start + rows], np.float32)
                yield first + start, torch.from_numpy(block)

    def entry(self, row: int) -> Entry:
        """What a row is of.

        Raises:
            UserError: the file that says it is damaged.
        """
        turn = bisect.bisect_right(self.first, row) - 1
        part, line = self.parts[turn], row - self.first[turn]
        path = self.folder / f"{part.name}.{self.tower}.jsonl"
        try:
            with path.open("rb") as file:
                said = json.loads(next(itertools.islice(file, line, None)))
            texts = [said["text"]] if "text" in said else said["captions"]
            return Entry(part.shard, said["sample"], said["key"], texts)
        except (OSError, StopIteration, ValueError, KeyError, TypeError):
            raise _damaged(path) from None

    def _features(self, part: store.Part) -> np.ndarray:
        path = self.folder / f"{part.name}.{self.tower}.npy"
        try:
            found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise _damaged(path) from None
        if found.shape != (part.rows[self.tower], self.width):
            raise _damaged(path)
        return found


def open_index(folder: Path, tower: str | None = None) -> Index:
    """The features in a folder.

    Args:
        tower: whose; default: the image tower's where there are any.

    Raises:
        UserError: there are none, or none of this tower.
    """
    meta = store.read_meta(folder)
    known = list(meta["towers"])
    if tower is not None and tower not in known:
        raise UserError(
            f"--tower {tower}: {folder} holds features of {' and '.join(known)} only; embed with that tower"
        )
    index = Index(folder, tower or known[0], meta, store.parts(folder))
    if not len(index):
        raise UserError(
            f"{folder} holds no {index.tower} features: start its pretrain embed again, or embed other shards"
        )
    return index


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: remove {path.name.partition('.')[0]}.* there and start pretrain embed again")
