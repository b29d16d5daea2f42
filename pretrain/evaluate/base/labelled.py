"""Image features with their classes, of all ranks: what a probe learns from and is tested on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.data.evaluation import EvalBatch
from pretrain.errors import UserError
from pretrain.evaluate.base import Setting
from pretrain.signals import interruptible


class Labelled(NamedTuple):
    """Samples in the data set's order."""

    features: np.ndarray
    """[N, D] fp32, unit norm."""
    labels: np.ndarray
    """[N] int64."""

    def at(self, rows: np.ndarray) -> Labelled:
        return Labelled(self.features[rows], self.labels[rows])


def labelled(setting: Setting, batches: Iterable[EvalBatch], field: str) -> Labelled:
    """Features of all ranks' labelled samples, computed once for each encoder and data set. Collective.

    Args:
        batches: this rank's part; has a `fingerprint` where it may be kept.
        field: data.eval or data.train, for messages.

    Raises:
        UserError: there are no samples, or one has no label.
    """
    known = getattr(batches, "fingerprint", None)
    make = _Made(setting, batches, field)
    found = make() if known is None else setting.cache.tensor("images", (known,), make)
    if not len(found):
        raise UserError(f"there are no samples in {field}")
    return Labelled(found[:, 1:].numpy(), found[:, 0].long().numpy())


class _Made:
    """[N, 1 + D] fp32: label, features. A label is exact in fp32 below 2**24."""

    def __init__(self, setting: Setting, batches: Iterable[EvalBatch], field: str) -> None:
        self._setting, self._batches, self._field = setting, batches, field

    def __call__(self) -> Tensor:
        setting = self._setting
        parts = [torch.empty(0, 1 + setting.width)]
        with setting.world.together(f"encoding {self._field}"), interruptible(), torch.inference_mode():
            for batch in self._batches:
                labels = torch.tensor(self._labels(batch), dtype=torch.float32)
                parts.append(torch.cat([labels[:, None], setting.images(batch).float().cpu()], 1))
        return setting.world.gather_rows(torch.cat(parts))

    def _labels(self, batch: EvalBatch) -> list[int]:
        for label, key in zip(batch.labels, batch.keys, strict=True):
            if label is None or not 0 <= label < 2**24:
                raise UserError(
                    f"{self._field}: {key} has label {label}: put an integer 'label' from 0 on into its json member"
                )
        return [label for label in batch.labels if label is not None]
