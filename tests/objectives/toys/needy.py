"""An objective of somebody else that uses everything an objective can ask for; no method anybody should train with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.objectives import ops
from pretrain.objectives.base import Objective
from pretrain.values import Pairs, Terms


class Needy(Objective):
    """CLIP, weighted by metadata; views find each other among those of all ranks; captions draw near their image."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Objective.Options):
        views: int = 2
        more: str = ""
        """A further need."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        columns = {"meta:label", "meta:score:float", "meta:language:text", "meta:boxes:2x4:float"}
        counted = {f"image_views:{options.views}", f"text_views:{options.views}", "captions:3"}
        self.needs = frozenset(columns | counted | ({options.more} if options.more else set()))

    def forward(self, pairs: Pairs) -> Terms:
        losses = ops.symmetric_cross_entropy(pairs) * self.trust(pairs.extra)
        return {
            "clip": pairs.mean(losses),
            "views": pairs.mean(self.views(pairs)),
            "captions": pairs.mean(self.captions(pairs)),
        }

    def trust(self, extra: dict[str, Tensor]) -> Tensor:
        """[B] a weight of each row, made of all its metadata."""
        label, language = extra["meta:label"] % 7, extra["meta:language"] % 5
        numbers = torch.cat([extra["meta:score"][:, None], extra["meta:boxes"].flatten(1)], dim=1).nan_to_num(0.5)
        return 1 + 0.1 * label + 0.1 * language + numbers.double().mean(dim=1)

    def views(self, pairs: Pairs) -> Tensor:
        """[B] cross-entropy of each image view's own text view among those of all ranks."""
        columns, ids = pairs.exchange.gather(pairs.extra["text_views"]), pairs.exchange.gather(pairs.ids)
        logits = pairs.logit_scale * torch.einsum("bkd,nkd->bkn", pairs.extra["image_views"], columns)
        own = pairs.ids[:, None] == ids
        return -(logits.log_softmax(dim=2) * own[:, None]).sum(dim=(1, 2))

    def captions(self, pairs: Pairs) -> Tensor:
        """[B] mean distance of an image's different captions."""
        captions, counts = pairs.extra["captions"], pairs.extra["caption_counts"]
        held = torch.arange(captions.shape[1]) < counts[:, None]
        return ((1 - torch.einsum("bcd,bd->bc", captions, pairs.image)) * held).sum(dim=1) / counts
