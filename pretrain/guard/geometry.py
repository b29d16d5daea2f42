"""Where the features of the two towers lie: logits of pairs and non-pairs, the gap between towers, rank, uniformity.

Sources: modality gap, Liang et al. 2022 (arXiv:2203.02053); effective rank, Roy and Vetterli 2007, of features as in
Garrido et al. 2023 (RankMe, arXiv:2210.02885), here of the covariance's eigenvalues; alignment and uniformity, Wang
and Isola 2020 (arXiv:2005.10242).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.precision import full_precision
from pretrain.values import Features
from pretrain.world import World

BLOCK = 512
"""Rows of each rank of which all pairs are looked at; everything else is of all rows."""
NAMES = (
    *("positive_logit", "negative_logit", "negative_logit_std", "negative_logit_max", "modality_gap", "alignment"),
    *("image_uniformity", "text_uniformity", "image_rank", "text_rank"),
)


@torch.no_grad()
def measure(features: Features, world: World) -> dict[str, float]:
    """Figures of the global batch, equal on all ranks, with NAMES. Collective; one copy to the host.

    Non-pairs and uniformity are those within each rank's first BLOCK rows. Where features are not finite, so are these.
    """
    with full_precision(features.image.device):
        found = _figures(_Sums(features, world), world)
    return dict(zip(NAMES, found.tolist(), strict=True))


class _Sums:
    """Sums over the rows of all ranks."""

    def __init__(self, features: Features, world: World) -> None:
        image, text = features.image.detach().float(), features.text.detach().float()
        scale = features.logit_scale.detach().float()
        bias = torch.zeros_like(scale) if features.logit_bias is None else features.logit_bias.detach().float()
        self.largest = image.new_zeros(world.size)
        negatives, self.largest[world.rank] = _negatives(image[:BLOCK], text[:BLOCK], scale, bias)
        cosines = (image * text).sum(1)
        self.rows = torch.stack([image.new_tensor(len(image)), cosines.sum(), (scale * cosines + bias).sum()])
        self.negatives = negatives
        self.near = torch.stack([_near(image[:BLOCK]), _near(text[:BLOCK])])
        self.first = torch.stack([image.sum(0), text.sum(0)])
        self.second = torch.stack([image.T @ image, text.T @ text])
        if world.size > 1:
            self._add()

    def _add(self) -> None:
        parts = [self.largest, self.rows, self.negatives, self.near, self.first, self.second]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        for part, summed in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
            part.copy_(summed.view(part.shape))


def _figures(sums: _Sums, world: World) -> Tensor:
    """[len(NAMES)], in their order."""
    rows, cosine, positive = sums.rows
    count, total, squares = sums.negatives
    mean = total / count
    spread = (squares / count - mean.square()).clamp(min=0).sqrt()
    centroids = sums.first / rows
    covariance = sums.second / rows - centroids[:, :, None] * centroids[:, None, :]
    near = (sums.near[:, 1] / sums.near[:, 0]).log()
    gap, alignment = (centroids[0] - centroids[1]).norm(), 2 - 2 * cosine / rows
    figures = [positive / rows, mean, spread, sums.largest.max(), gap, alignment]
    return torch.stack([*figures, *near, *_ranks(covariance)])


def _negatives(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Count, sum and sum of squares of the logits [R, R] off the diagonal, and the largest one."""
    logits = scale * (image @ text.T) + bias
    off = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    kept = torch.where(off, logits, 0.0)
    largest = torch.where(off, logits, -torch.inf).max()
    return torch.stack([off.sum().float(), kept.sum(), kept.square().sum()]), largest


def _near(rows: Tensor) -> Tensor:
    """How many pairs of different rows there are, and the sum of exp(-2 distance^2) over them."""
    distances = (2 - 2 * rows @ rows.T).clamp(min=0)
    off = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return torch.stack([off.sum().float(), torch.where(off, (-2 * distances).exp(), 0.0).sum()])


def _ranks(covariances: Tensor) -> Tensor:
    """exp of the entropy of each covariance's eigenvalues, [2, D, D] -> [2], between 1 and D.

    NaN where they are not finite, on which the eigenvalues' routine would fail.
    """
    good = covariances.isfinite().all()
    eigenvalues = torch.linalg.eigvalsh(torch.where(good, covariances, 0.0)).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.where(good, torch.special.entr(shares).sum(-1).exp(), torch.nan)
