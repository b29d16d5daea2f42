"""Held-out samples: each exactly once over all ranks, with all its captions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.config import Data
from pretrain.data.decode import BadSample, decode
from pretrain.data.patterns import expand
from pretrain.data.reader import RawSample, ShardSource, Source
from pretrain.data.rows import Tokenize
from pretrain.data.synthetic import SyntheticSource
from pretrain.data.transforms import ImageSpec, eval_image
from pretrain.data.workers import worker_loader
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


class EvalLoader:
    """Iterable any number of times."""

    def __init__(self, parts: EvalParts, data: Data, world: World, batch_size: int) -> None:
        self.samples = len(parts.source)
        """Of all ranks together."""
        self.fingerprint = parts.source.fingerprint
        self._parts, self._data, self._device = parts, data, world.device
        start, stop = (self.samples * rank // world.size for rank in (world.rank, world.rank + 1))
        self._pieces = [range(at, min(at + batch_size, stop)) for at in range(start, stop, batch_size)]

    def __len__(self) -> int:
        """Batches of this rank; ranks may differ, and one may have none."""
        return len(self._pieces)

    def __iter__(self) -> Iterator[EvalBatch]:
        for batch in worker_loader(self._parts, self._pieces, self._data, self._device):
            if isinstance(batch, UserError):
                raise batch
            images = batch.images.to(self._device, non_blocking=True)
            yield batch._replace(images=images, texts=batch.texts.to(self._device, non_blocking=True))


def eval_loader(data: Data, world: World, spec: ImageSpec, tokenize: Tokenize, batch_size: int) -> EvalLoader:
    """This rank's contiguous share of the held-out set, in its order.

    Args:
        batch_size: samples per batch; the last one of a rank may be smaller.

    Raises:
        UserError: data.eval is empty or names nothing, or a shard is no good tar; while iterating: a sample cannot
            be used, for a measurement over another set than the one named would go unnoticed.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    return EvalLoader(EvalParts(_source(data, world, spec), spec, tokenize), data, world, batch_size)


class EvalParts(Dataset["EvalBatch | UserError"]):
    """Ranges of sample numbers -> batches on the CPU; a user's mistake comes back as a value, as in training."""

    def __init__(self, source: Source, spec: ImageSpec, tokenize: Tokenize) -> None:
        self.source, self.spec, self.tokenize = source, spec, tokenize

    def __getitem__(self, numbers: range) -> EvalBatch | UserError:
        try:
            rows = [self._row(number) for number in numbers]
        except UserError as error:
            return error
        samples = [sample for _, sample in rows]
        texts = [text for sample in samples for text in sample.captions]
        return EvalBatch(
            images=torch.from_numpy(np.stack([image for image, _ in rows])),
            texts=self.tokenize(texts) if texts else self.tokenize([""])[:0],
            captions=[sample.captions for sample in samples],
            labels=[_label(sample) for sample in samples],
            numbers=list(numbers),
            keys=tuple(sample.key for sample in samples),
        )

    def _row(self, number: int) -> tuple[np.ndarray, RawSample]:
        try:
            sample = self.source.sample(number)
            return eval_image(decode(sample.image_bytes), self.spec), sample
        except BadSample as bad:
            raise UserError(f"data.eval: {self.source.key(number)} cannot be used ({bad}); take it out") from None


def _source(data: Data, world: World, spec: ImageSpec) -> Source:
    if data.source == "synthetic":
        return SyntheticSource(data.synthetic_samples, spec.size, first=data.synthetic_samples)
    if not data.eval:
        raise UserError("data.eval is empty: name held-out shards")
    paths = expand(data.eval, "data.eval")
    return ShardSource(paths, data, start=world.rank * len(paths) // world.size, field="data.eval")


def _label(sample: RawSample) -> int | None:
    label = sample.meta.get("label")
    return label if isinstance(label, int) and not isinstance(label, bool) else None
