"""Samples -> what the towers take and what a row of features is called. Runs in workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pretrain.data.images.decode import BadSample, decode
from pretrain.data.images.transforms import ImageSpec, eval_image
from pretrain.data.rows import Tokenize
from pretrain.data.shards.reader import RawSample, Source
from pretrain.data.slab import Column, Columns
from pretrain.data.stages import Stages
from pretrain.data.stream import Take


class Read(NamedTuple):
    """A sample without its pixels."""

    number: int
    key: str
    """`shard/key`."""
    captions: list[str]
    bad: str | None
    """Why it cannot be used; its row of pixels is then meaningless."""


class Part(NamedTuple):
    """What comes of some samples beside their pixels."""

    samples: list[Read]
    tokens: np.ndarray | None
    """[T, L] int64 of all captions of the good samples, one sample after the other; None where none are wanted."""


class Rows:
    """A `stream.Maker` of every sample once, in order; a sample that cannot be used is told, not replaced.

    Args:
        tokenize: None where no texts are wanted.
        images: whether pixels are wanted; where they are not, none are decoded.
    """

    def __init__(self, source: Source, spec: ImageSpec, tokenize: Tokenize | None, images: bool) -> None:
        self.source, self.spec, self.tokenize, self.images = source, spec, tokenize, images
        self.layout = {"images": Column((3, *spec.size) if images else (0,), torch.uint8)}

    def number(self, place: int) -> int:
        return place

    def read(self, number: int) -> RawSample:
        return self.source.sample(number)

    def make(self, places: Sequence[int], out: Columns, take: Take, stages: Stages) -> Part:
        samples = [self._sample(place, out["images"][row], take, stages) for row, place in enumerate(places)]
        if self.tokenize is None:
            return Part(samples, None)
        with stages.at("text"):
            texts = [text for sample in samples if sample.bad is None for text in sample.captions]
            tokens = self.tokenize(texts) if texts else self.tokenize([""])[:0]
        return Part(samples, tokens.numpy())

    def _sample(self, number: int, image: torch.Tensor, take: Take, stages: Stages) -> Read:
        try:
            with stages.at("read", number):
                sample = take(number, number)
            if self.images:
                with stages.at("decode", number):
                    image.copy_(torch.from_numpy(eval_image(decode(sample.image_bytes), self.spec)))
        except BadSample as bad:
            return Read(number, self.source.key(number), [], str(bad))
        return Read(number, sample.key, sample.captions, None)
