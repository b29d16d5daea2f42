"""Held-out samples: each exactly once over all ranks, with all its captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.config import Data
from pretrain.data import patterns, storage
from pretrain.data.images.decode import BadSample, decode
from pretrain.data.images.transforms import ImageSpec, eval_image
from pretrain.data.rows import Tokenize
from pretrain.data.shards.reader import RawSample, ShardSource, Source
from pretrain.data.slab import Column, Columns
from pretrain.data.stages import Stages
from pretrain.data.stream import Take, stream
from pretrain.data.synthetic import SyntheticSource
from pretrain.errors import UserError
from pretrain.world import World


class EvalBatch(NamedTuple):
    """Consecutive held-out samples of this rank."""

    images: Tensor
    """[b, 3, H, W] uint8 on the device."""
    texts: Tensor
    """[T, L] int64 on the device: the tokens of all captions of all b samples, one sample after the other."""
    captions: list[list[str]]
    """b lists; their lengths sum to T. A sample may have none."""
    labels: list[int | None]
    """b values of the json member's `label`."""
    numbers: list[int]
    """b sample numbers in the held-out set."""
    keys: tuple[str, ...]
    """b names, `shard/key`."""


class EvalPart(NamedTuple):
    """What comes of some held-out samples beside their pixels."""

    texts: np.ndarray
    """[T, L] int64."""
    captions: list[list[str]]
    labels: list[int | None]
    numbers: list[int]
    keys: list[str]


class EvalLoader:
    """Iterable any number of times."""

    def __init__(self, rows: EvalRows, data: Data, world: World, batch_size: int, most: int | None = None) -> None:
        everything = range(0, len(rows.source), max(1, len(rows.source) // most if most else 1))[:most]
        self.samples = len(everything)
        """Of all ranks together."""
        self.fingerprint = rows.source.fingerprint
        self._rows, self._data, self._world = rows, data, world
        start, stop = (self.samples * rank // world.size for rank in (world.rank, world.rank + 1))
        self._pieces = [everything[at : min(at + batch_size, stop)] for at in range(start, stop, batch_size)]

    def __len__(self) -> int:
        """Batches of this rank; ranks may differ, and one may have none."""
        return len(self._pieces)

    def __iter__(self) -> Iterator[EvalBatch]:
        device = self._world.device
        made = stream(self._rows, self._pieces, self._data, device, self._world.rank)
        try:
            for batch in made:
                texts = torch.from_numpy(np.concatenate([part.texts for part in batch.notes]))
                yield EvalBatch(
                    images=batch.columns["images"],
                    texts=texts.to(device, non_blocking=True),
                    captions=[texts for part in batch.notes for texts in part.captions],
                    labels=[label for part in batch.notes for label in part.labels],
                    numbers=[number for part in batch.notes for number in part.numbers],
                    keys=tuple(key for part in batch.notes for key in part.keys),
                )
        finally:
            made.close()


def eval_loader(
    data: Data, world: World, spec: ImageSpec, tokenize: Tokenize, batch_size: int, most: int | None = None
) -> EvalLoader:
    """This rank's contiguous share of the held-out set, in its order.

    Args:
        batch_size: samples per batch; the last one of a rank may be smaller.
        most: take this many samples of the set, equally far apart; None, or more than there are: all.

    Raises:
        UserError: data.eval is empty or names nothing, or a shard is no good tar; while iterating: a sample cannot
            be used, for a measurement over another set than the one named would go unnoticed.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    return EvalLoader(EvalRows(_source(data, world, spec), spec, tokenize), data, world, batch_size, most)


class EvalRows:
    """Sample numbers -> rows of images [3, H, W] uint8, always at full quality, and what belongs to them."""

    def __init__(self, source: Source, spec: ImageSpec, tokenize: Tokenize) -> None:
        self.source, self.spec, self.tokenize = source, spec, tokenize
        self.layout = {"images": Column((3, *spec.size), torch.uint8)}

    def number(self, place: int) -> int:
        return place

    def read(self, number: int) -> RawSample:
        return self.source.sample(number)

    def make(self, places: Sequence[int], out: Columns, take: Take, stages: Stages) -> EvalPart:
        samples = [self._sample(place, out["images"][row], take, stages) for row, place in enumerate(places)]
        texts = [text for sample in samples for text in sample.captions]
        with stages.at("text"):
            tokens = self.tokenize(texts) if texts else self.tokenize([""])[:0]
        return EvalPart(
            texts=tokens.numpy(),
            captions=[sample.captions for sample in samples],
            labels=[_label(sample) for sample in samples],
            numbers=list(places),
            keys=[sample.key for sample in samples],
        )

    def _sample(self, number: int, image: Tensor, take: Take, stages: Stages) -> RawSample:
        try:
            with stages.at("read", number):
                sample = take(number, number)
            with stages.at("decode", number):
                image.copy_(torch.from_numpy(eval_image(decode(sample.image_bytes), self.spec)))
            return sample
        except BadSample as bad:
            raise UserError(f"data.eval: {self.source.key(number)} cannot be used ({bad}); take it out") from None


def _source(data: Data, world: World, spec: ImageSpec) -> Source:
    if data.synthetic is not None and not data.eval:
        return SyntheticSource(data.synthetic, spec.size, first=data.synthetic)
    if not data.eval:
        raise UserError("data.eval is empty: name held-out shards")
    store = storage.make(data)
    entries = patterns.entries(data.eval, store, "data.eval")
    start = world.rank * sum(len(entry.paths) for entry in entries) // world.size
    source = ShardSource(entries, data, store, start, field="data.eval")
    for note in source.damage[:1]:
        raise UserError(f"data.eval: {note.shard}: {note.reason}; a measurement over less would go unnoticed")
    return source


def _label(sample: RawSample) -> int | None:
    label = sample.meta.get("label")
    return label if isinstance(label, int) and not isinstance(label, bool) else None
