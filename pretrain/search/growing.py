"""The features of one shard, batch by batch."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.stream import Made
from pretrain.errors import UserError
from pretrain.search import store
from pretrain.search.job import Job
from pretrain.search.rows import Part, Read


class Growing:
    """The features of a shard, as far as they are computed."""

    def __init__(self, job: Job, shard: int) -> None:
        self._job, self._shard = job, shard
        self._features: dict[str, list[np.ndarray]] = {tower: [] for tower in job.how.towers}
        self._entries: dict[str, list[dict[str, Any]]] = {tower: [] for tower in job.how.towers}
        self._left_out: list[str] = []

    def add(self, batch: Made[Part]) -> None:
        """Encode a batch.

        Raises:
            UserError: features are not finite.
        """
        samples = list(chain.from_iterable(part.samples for part in batch.notes))
        self._left_out += [f"{sample.key}: {sample.bad}" for sample in samples if sample.bad is not None]
        rows = [row for row, sample in enumerate(samples) if sample.bad is None]
        good = [samples[row] for row in rows]
        if "image" in self._features and good:
            self._keep("image", self._job.opened.encoder.encode_image(batch.columns["images"][rows]))
            self._entries["image"] += [self._named(sample) | {"captions": sample.captions} for sample in good]
        if "text" in self._features:
            tokens, size = _tokens(batch), self._job.how.batch_size
            for start in range(0, len(tokens), size):
                self._keep("text", self._job.opened.encoder.encode_text(tokens[start : start + size]))
            self._entries["text"] += [self._named(each) | {"text": text} for each in good for text in each.captions]

    def write(self, out: Path, rank: int) -> store.Part:
        """Put them where they are to stay."""
        none = np.empty((0, self._job.width), self._job.how.stored)
        whole = {tower: np.concatenate([none, *found]) for tower, found in self._features.items()}
        return store.write_part(out, rank, self._shard, whole, self._entries, self._left_out)

    def _keep(self, tower: str, features: Tensor) -> None:
        if not bool(torch.isfinite(features).all()):
            name = self._job.source.shards[self._shard].path
            raise UserError(f"{name}: the {tower} tower gives features that are not finite: take other weights")
        self._features[tower].append(features.cpu().numpy().astype(self._job.how.stored))

    def _named(self, sample: Read) -> dict[str, Any]:
        return {"key": sample.key, "sample": sample.number - self._job.first[self._shard]}


def _tokens(batch: Made[Part]) -> Tensor:
    """[T, L] of all captions of a batch, on the device."""
    found = [part.tokens for part in batch.notes if part.tokens is not None and len(part.tokens)]
    if not found:
        return torch.empty(0, 1, dtype=torch.int64)
    return torch.from_numpy(np.concatenate(found)).to(batch.columns["images"].device)
