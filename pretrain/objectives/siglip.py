"""SigLIP: every pair of an image and a text is its own yes-or-no question."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.objectives import ops
from pretrain.objectives.base import Objective
from pretrain.values import Pairs, Terms


class SigLip(Objective):
    """Pairwise sigmoid loss; the bias starts low because almost every pair is a no.

    Source: Zhai et al. 2023, eq. 1 and section 3.2 (arXiv:2303.15343).
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Objective.Options):
        duplicates: ops.Duplicates = "negatives"
        """What a pair's copies in the batch (same sample, other row) are to it: negatives, as in the paper; left out
        (ignore); or further positives."""

    options: Options
    init_logit_scale = 10.0
    init_logit_bias = -10.0
    max_logit_scale = math.inf

    def forward(self, pairs: Pairs) -> Terms:
        return {"siglip": self.options.weight * ops.pairwise_sigmoid(pairs, self.options.duplicates)}
