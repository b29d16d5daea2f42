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
    """Names of extra columns of the batch or features; a run that cannot give them fails before the first batch."""
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
