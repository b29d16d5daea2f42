"""Which held-out samples a task reads: shards, class folders, or the images of annotation files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import Data
from pretrain.data.evaluation import EvalBatch, EvalLoader, EvalRows, eval_loader
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.rows import Tokenize
from pretrain.errors import UserError
from pretrain.evaluate.base import published
from pretrain.evaluate.base.pictures import Pictures, of_folder
from pretrain.world import World

KINDS = {
    "shards": "shards",
    "folders": "a folder of class folders",
    "captions": "COCO's or Karpathy's JSON",
    "composition": "JSON files of ARO or SugarCrepe",
    "conditional": "JSON files of GeneCIS",
}


@dataclass(frozen=True)
class Samples:
    """This rank's part of the samples, and what is known of all of them."""

    batches: Iterable[EvalBatch]
    fingerprint: str
    names: tuple[str, ...]
    """The entries that they come from."""
    folders: list[str] | None = None
    records: Sequence[Any] = ()
    left_out: int = 0


@dataclass(frozen=True)
class Opener:
    """How samples are read."""

    world: World
    spec: ImageSpec
    tokenize: Tokenize
    batch_size: int

    def open(self, data: Data, reads: Sequence[str], task: str) -> Samples:
        """The entries of data.eval that a task reads.

        Raises:
            UserError: there are none, or they are of several kinds.
        """
        if data.synthetic is not None and not data.eval and "shards" in reads:
            return self._shards(data)
        kinds = {entry: kind_of(entry) for entry in data.eval}
        mine = tuple(entry for entry, kind in kinds.items() if kind in reads)
        if not mine:
            wanted = " or ".join(KINDS[kind] for kind in reads)
            raise UserError(f"{task} reads {wanted}, and data.eval names none: name held-out data with --data")
        found = {kinds[entry] for entry in mine}
        if len(found) > 1:
            named = " and ".join(KINDS[kind] for kind in sorted(found))
            raise UserError(f"{task} was given {named} at once: name one kind with --data")
        return self._of_kind(found.pop(), dataclasses.replace(data, eval=mine))

    def _of_kind(self, kind: str, data: Data) -> Samples:
        if kind == "shards":
            return self._shards(data)
        if kind == "folders":
            if len(data.eval) > 1:
                raise UserError(f"data.eval: {', '.join(data.eval)}: name one folder of class folders at a time")
            pictures, names = of_folder(Path(data.eval[0]).expanduser())
            return self._pictures(pictures, data, folders=names)
        found = published.read(data.eval)
        return self._pictures(Pictures(found.pictures), data, records=found.records, left_out=found.left_out)

    def _shards(self, data: Data) -> Samples:
        loader = eval_loader(data, self.world, self.spec, self.tokenize, self.batch_size)
        return Samples(loader, loader.fingerprint, data.eval)

    def _pictures(self, pictures: Pictures, data: Data, **known: Any) -> Samples:
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size} must be at least 1")
        loader = EvalLoader(EvalRows(pictures, self.spec, self.tokenize), data, self.world, self.batch_size)
        return Samples(loader, loader.fingerprint, data.eval, **known)


def kind_of(entry: str) -> str:
    """One of KINDS; shards where it is nothing else."""
    if published.is_annotation(entry):
        return published.kind_of(entry) or "shards"
    return "folders" if "://" not in entry and Path(entry).expanduser().is_dir() else "shards"
