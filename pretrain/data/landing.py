"""Until pixels and wanted columns land: the pair alone, by Pillow."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.config import Data
from pretrain.data.decode import decode
from pretrain.data.transforms import ImageSpec, train_image


class Pixels:
    def __init__(self, spec: ImageSpec, data: Data) -> None:
        self.spec, self.data = spec, data

    def train(self, encoded: bytes, rng: random.Random, out: Tensor) -> None:
        out.copy_(torch.from_numpy(train_image(decode(encoded), self.spec, self.data, rng)))

    view = train


@dataclass(frozen=True)
class Wanted:
    captions: int = 0
    image_views: int = 0
    text_views: int = 0
    fields: tuple[Any, ...] = ()

    @staticmethod
    def of(needs: Iterable[str]) -> Wanted:
        assert not list(needs)
        return Wanted()


def columns(metas: list[dict[str, Any]], fields: tuple[Any, ...]) -> dict[str, Tensor]:
    return {}
