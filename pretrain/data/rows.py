"""Position in the stream -> a finished row. Runs in workers; pure, so that no number of workers or ranks shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.config import Data
from pretrain.data.captions import choose
from pretrain.data.decode import BadSample, decode
from pretrain.data.order import Order, sample_random
from pretrain.data.reader import Source
from pretrain.data.transforms import ImageSpec, train_image
from pretrain.errors import UserError
from pretrain.values import Skip

Tokenize = Callable[[list[str]], Tensor]
MAX_ATTEMPTS = 16
"""Replacements tried for one position; so many bad ones in a row are no accident."""


class Part(NamedTuple):
    """Some rows of a batch, in the shape in which they leave a worker."""

    images: Tensor
    """[b, 3, H, W] uint8."""
    texts: Tensor
    """[b, L] int64."""
    ids: Tensor
    """[b] int64 sample numbers."""
    keys: tuple[str, ...]
    skips: tuple[Skip, ...]
    truncated: int
    """Captions of these rows that did not fit the context length."""


@dataclass(frozen=True)
class Row:
    image: np.ndarray
    """[3, H, W] uint8."""
    caption: str
    number: int
    key: str


class TrainParts(Dataset[Part | UserError]):
    """Lists of positions -> parts of batches.

    A user's mistake met in a worker comes back as a value, because an exception would reach the consumer with the
    worker's whole traceback for a message.
    """

    def __init__(self, source: Source, order: Order, data: Data, spec: ImageSpec, tokenize: Tokenize) -> None:
        self.source, self.order, self.data, self.spec, self.tokenize = source, order, data, spec, tokenize

    def __getitem__(self, positions: list[int]) -> Part | UserError:
        skips: list[Skip] = []
        try:
            rows = [self.row(position, skips) for position in positions]
        except UserError as error:
            return error
        texts = [row.caption for row in rows]
        tokens = self.tokenize(texts)
        cut = getattr(self.tokenize, "truncated", None)
        return Part(
            images=torch.from_numpy(np.stack([row.image for row in rows])),
            texts=tokens,
            ids=torch.tensor([row.number for row in rows]),
            keys=tuple(row.key for row in rows),
            skips=tuple(skips),
            truncated=cut(texts, tokens) if cut else 0,
        )

    def row(self, position: int, skips: list[Skip]) -> Row:
        """The row at a position; an unusable sample is replaced, by the same one everywhere, and noted in `skips`.

        Raises:
            UserError: MAX_ATTEMPTS samples in a row cannot be used.
        """
        number = self.order.number(position)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return self._use(number, position, attempt - 1)
            except BadSample as bad:
                shard, _, key = self.source.key(number).partition("/")
                skips.append(Skip(position, shard, key, str(bad)))
                number = self.order.replacement(position, attempt)
        last = skips[-1]
        reason = f"the last is {last.shard}/{last.key}: {last.reason}"
        raise UserError(f"data.train: {MAX_ATTEMPTS} samples in a row cannot be used, {reason}; repair the shards")

    def _use(self, number: int, position: int, attempt: int) -> Row:
        raw = self.source.sample(number)
        rng = sample_random(self.order.seed, position, attempt)
        caption = choose(raw.captions, rng)
        return Row(train_image(decode(raw.image_bytes), self.spec, self.data, rng), caption, number, raw.key)
