"""The one page to read before writing an objective.

An objective turns `Pairs` into weighted scalars. It sees this rank's rows, an exchange that brings the columns of all
ranks, the scale and bias, and whatever extra inputs it says it needs: never a rank. It returns the mean over its rows;
exchange and engine make that the mean over the world. One file per method, and its class looks like this::

    class SigLip(Objective):
        '''Pairwise sigmoid loss. Source: Zhai et al. 2023, eq. 1 (arXiv:2303.15343).'''

        @dataclass(frozen=True, kw_only=True)
        class Options(Objective.Options):
            ...

        def forward(self, pairs: Pairs) -> Terms:
            return {"siglip": self.options.weight * ops.pairwise_sigmoid(pairs)}

What it needs beside image, text and ids it says in `needs`, and finds by name in `pairs.extra`, for this rank's rows
(D is the width of the embedding; what passes a tower becomes unit-norm features that carry a gradient)::

    needs                       pairs.extra
    image_views:2               image_views [B, 2, D]: further crops of the image, augmented by data.view_augment
    text_views:2                text_views [B, 2, D]: the caption, edited by data.text_edits
    captions:4                  captions [B, 4, D]: of all the image's captions, in random order; where there are fewer
                                they repeat from the first, and caption_counts [B] int64 says how many are different
    meta:label                  meta:label [B] int64, -1 where a sample has none
    meta:score:float            meta:score [B] fp32, NaN where a sample has none
    meta:language:text          meta:language [B] int64: a hash; equal ids are equal texts; -1 for none
    meta:boxes:10x4:float       meta:boxes [B, 10, 4] fp32, cut or filled with NaN (integers: -1)

Objectives of one run share what they need: of two numbers of captions or views everyone gets the larger one. Columns of
other ranks, where a method needs them, come with `pairs.exchange.gather`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn

from pretrain.values import Pairs, Terms


class Objective(nn.Module, ABC):
    """A term, or several, of the loss."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        weight: float = 1.0
        """Factor of this objective in the sum."""

    needs: frozenset[str] = frozenset()
    """Further columns, as above; a run that cannot give them fails before the first batch. Where they depend on the
    options, `__init__` sets them: `self.needs = frozenset({f"captions:{options.captions}"})`."""
    streams: bool = True
    """Whether it works block by block; False asks for an exchange that holds all columns at once."""
    init_logit_scale: float = 1 / 0.07
    """Where a fresh logit scale starts, as the factor itself."""
    init_logit_bias: float | None = None
    """Where a fresh logit bias starts; None: the objective has none."""
    max_logit_scale: float = math.inf
    """Ceiling of the learned scale."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options

    @abstractmethod
    def forward(self, pairs: Pairs) -> Terms:
        """Weighted mean over this rank's rows of each term, [] fp32, as `pairs.mean` takes it."""
