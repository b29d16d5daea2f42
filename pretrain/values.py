"""What flows through a step: Batch -> Features -> Pairs -> Terms -> StepReport.

Shapes, everywhere in this project: B pairs on this rank, W ranks, N = B * W pairs in the world, D embedding width,
L tokens of a text, H and W pixels of an image where no rank is near, K entries of a queue, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.exchange.base import Exchange
    from pretrain.exchange.trip import Trip

Terms = dict[str, Tensor]
"""Named scalars [] fp32, already weighted; every entry counts and they are summed."""


Announce = Callable[[Tensor], Tensor]
"""Text features [B, D] that are ready before the image tower starts -> the same, now on their way to other ranks."""

IMAGES, TEXTS = ("image_views",), ("text_views", "captions")
"""Columns of `Batch.extra` that go through a tower, [B, K, ...] to [B, K, D]; all others reach an objective as they
are."""


@dataclass(frozen=True)
class Skip:
    """A sample that could not be used and was replaced by another, the same one on every rank."""

    index: int
    """Position in the run's sample order."""
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """This rank's consecutive part of a global batch."""

    images: Tensor
    """[B, 3, H, W] uint8, RGB."""
    texts: Tensor
    """[B, L] int64 token ids."""
    ids: Tensor
    """[B] int64: the sample's number in the data set; equal ids are the same sample."""
    keys: tuple[str, ...]
    """B names, `shard/key`, for messages."""
    skips: tuple[Skip, ...] = ()
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further columns an objective asked for by name (`objectives.base` lists them), [B, ...]."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, copied without waiting where the memory is pinned."""
        move = {k: v.to(device, non_blocking=True) for k, v in self.tensors().items()}
        extra = {k: move[k] for k in self.extra}
        return replace(self, images=move["images"], texts=move["texts"], ids=move["ids"], extra=extra)

    def split(self, size: int) -> list[Batch]:
        """Consecutive parts of `size` rows, the last one possibly smaller."""
        return [self.rows(start, start + size) for start in range(0, len(self), size)]

    def rows(self, start: int, stop: int) -> Batch:
        part = {k: v[start:stop] for k, v in self.tensors().items()}
        extra = {k: part[k] for k in self.extra}
        return Batch(part["images"], part["texts"], part["ids"], self.keys[start:stop], (), extra)

    def tensors(self) -> dict[str, Tensor]:
        return {"images": self.images, "texts": self.texts, "ids": self.ids, **self.extra}

    @property
    def for_towers(self) -> dict[str, Tensor]:
        """Further images and texts, [B, K, 3, H, W] and [B, K, L]."""
        return {name: column for name, column in self.extra.items() if name in IMAGES + TEXTS}

    @property
    def columns(self) -> dict[str, Tensor]:
        """What an objective takes as it is."""
        return {name: column for name, column in self.extra.items() if name not in IMAGES + TEXTS}


@dataclass(frozen=True)
class Features:
    """What the two towers make of a batch."""

    image: Tensor
    """[B, D] fp32 (fp64 in tests), unit norm."""
    text: Tensor
    """[B, D], the same."""
    logit_scale: Tensor
    """[] positive: logits are logit_scale * cosine + logit_bias."""
    logit_bias: Tensor | None = None
    """[] or None where the objective has no bias."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Of further images and texts that an objective asked for, [B, K, D] under their names in the batch."""

    def rows(self) -> dict[str, Tensor]:
        """What has a row for each pair, by name."""
        return {"image": self.image, "text": self.text, **self.extra}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that may carry a gradient, by name."""
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return self.rows() | {"logit_scale": self.logit_scale} | bias

    @staticmethod
    def of(named: dict[str, Tensor]) -> Features:
        """The features whose `tensors()` are these."""
        extra = {k: v for k, v in named.items() if k not in ("image", "text", "logit_scale", "logit_bias")}
        return Features(named["image"], named["text"], named["logit_scale"], named.get("logit_bias"), extra)


@dataclass(frozen=True)
class Pairs:
    """What an objective sees: this rank's rows, and a way to the columns of all ranks. Never a rank."""

    features: Features
    exchange: Exchange
    ids: Tensor | None = None
    """[B] int64 sample ids."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """The batch's further columns that go through no tower."""

    @property
    def extra(self) -> dict[str, Tensor]:
        """What the objective asked for beside image and text, for this rank's rows.

        'image_views', 'text_views' and 'captions' are features [B, K, D], unit norm, differentiable; 'caption_counts'
        [B] int64 and 'meta:FIELD' [B, ...] are as the data has them.
        """
        return self.features.extra | self.columns

    @cached_property
    def trip(self) -> Trip:
        """The columns of all ranks, for this batch. Collective at first use.

        Raises:
            ValueError: the features do not fit together; as `Exchange.bring` says, on every rank.
        """
        return self.exchange.bring(self.text, self._problem())

    def mean(self, values: Tensor) -> Tensor:
        """[B] or [] summed over this rank's rows -> what this rank contributes to the mean over the world's N pairs.

        With equally many rows on every rank that is the mean over this rank's; its mean over ranks is always right.
        """
        return values.sum() / (self.trip.count / self.exchange.size)

    def _problem(self) -> str | None:
        image, text = self.image, self.text
        if image.shape != text.shape or image.ndim != 2:
            shapes = f"image features {list(image.shape)} and text features {list(text.shape)}"
            return f"{shapes} must both be [B, D]"
        if image.dtype != text.dtype or not image.is_floating_point():
            return f"image features {image.dtype} and text features {text.dtype} must share one floating dtype"
        scalars = {"logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        for name, value in ({"text features": text} | scalars).items():
            if value is not None and value.device != image.device:
                return f"{name} on {value.device} must be on {image.device}, as the image features are"
        for name, value in scalars.items():
            if value is not None and value.ndim:
                return f"{name} {list(value.shape)} must be a scalar []"
            if value is not None and self.exchange.checking and not math.isfinite(value.detach()):
                return f"{name} {float(value)} must be finite: the optimizer has diverged, lower the learning rate"
        return self._overflow()

    def _overflow(self) -> str | None:
        """Whether features are too large for the dtype in which they are multiplied; unit vectors never are."""
        products = self.exchange.options.products
        if not self.exchange.checking or products is None or not self.image.numel():
            return None
        peak, most = max(float(x.detach().abs().max()) for x in (self.image, self.text)), torch.finfo(products).max
        if not peak > most:
            return None
        return f"features reach {peak:.3g}, and {products} ends at {most:.3g}: normalise them to unit length"

    @property
    def image(self) -> Tensor:
        return self.features.image

    @property
    def text(self) -> Tensor:
        return self.features.text

    @property
    def logit_scale(self) -> Tensor:
        return self.features.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        return self.features.logit_bias


@dataclass(frozen=True)
class GradNorms:
    """Euclidean norms of the averaged gradient before clipping, fp32 scalars [] on the model's device."""

    total: Tensor
    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class Outcome:
    """What one optimizer step gave on this rank, as it lies on the device."""

    terms: Terms
    features: Features
    grad_norms: GradNorms
    lr: float

    def report(self) -> StepReport:
        """Its numbers, cut from the graph."""
        return StepReport.of(self.terms, self.features, self.grad_norms)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did on this rank; tensors stay on the device until somebody logs them."""

    loss: Tensor
    """[] this rank's loss; its mean over ranks is the loss of the global batch."""
    terms: Terms
    grad_norms: GradNorms
    logit_scale: Tensor
    """[] as used in this step."""
    logit_bias: Tensor | None

    @staticmethod
    def of(terms: Terms, features: Features, grad_norms: GradNorms) -> StepReport:
        """What a step leaves behind, cut from the graph."""
        named = {name: term.detach() for name, term in terms.items()}
        bias = features.logit_bias
        scale = features.logit_scale.detach()
        loss = torch.stack(list(named.values())).sum()
        return StepReport(loss, named, grad_norms, scale, None if bias is None else bias.detach())
