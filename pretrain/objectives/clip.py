"""CLIP: each image picks its text among all texts, each text its image among all images."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import UserError
from pretrain.objectives import ops
from pretrain.objectives.base import Objective
from pretrain.values import Pairs, Terms


class Clip(Objective):
    """Symmetric softmax cross-entropy, InfoNCE in both directions.

    Source: Radford et al. 2021, fig. 3 and section 2.5 (arXiv:2103.00020).
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Objective.Options):
        label_smoothing: float = 0.0
        """Share of each target that is spread evenly over all pairs."""

        duplicates: ops.Duplicates = "negatives"
        """What a pair's copies in the batch (same sample, other row) are to it: negatives, as in the paper; left out
        (ignore); or further positives."""

        def __post_init__(self) -> None:
            if not 0 <= self.label_smoothing < 1:
                raise UserError(
                    f"label_smoothing {self.label_smoothing} is a share of the target: it must lie in [0, 1)"
                )

    options: Options
    init_logit_scale = 1 / 0.07
    max_logit_scale = 100.0

    def forward(self, pairs: Pairs) -> Terms:
        losses = ops.symmetric_cross_entropy(pairs, self.options.label_smoothing, self.options.duplicates)
        return {"clip": self.options.weight * pairs.mean(losses)}
