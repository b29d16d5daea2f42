"""Where features lie: alignment of pairs, uniformity, the gap between the towers, effective rank, hubs.

Sources: alignment and uniformity, Wang and Isola 2020 (arXiv:2005.10242), with alpha 2 and t 2; modality gap, Liang et
al. 2022 (arXiv:2203.02053); effective rank, Roy and Vetterli 2007, of the covariance's eigenvalues; hubness as the
skewness of k-occurrences, Radovanovic et al. 2010 (JMLR 11), k = 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluate.base import Setting
from pretrain.evaluate.retrieval import encode, gather
from pretrain.signals import interruptible

READS = ("shards", "captions")
NEIGHBOURS = 10
ROWS, COLUMNS = 256, 2048
"""Scores that exist at one moment."""


def measure(setting: Setting) -> dict[str, Any]:
    """Figures of the held-out pairs; a caption that several images carry is one text. Collective.

    Raises:
        UserError: there are not two images and two captions.
    """
    with setting.world.together("encoding held-out pairs"), interruptible(), torch.inference_mode():
        own = encode(setting)
    found = gather(setting, own)
    if min(len(found.images), len(found.texts)) < 2:
        raise UserError("geometry needs two images with captions that differ: check data.eval and data.text_keys")
    images, texts = (rows.to(setting.world.device) for rows in (found.images, found.texts))
    n, m = found.pairs.unbind(1)
    figures: dict[str, Any] = {"images": len(images), "texts": len(texts), "pairs": len(found.pairs)}
    figures["alignment"] = float((found.images[n] - found.texts[m]).double().square().sum(1).mean())
    figures["modality_gap"] = float((found.images.double().mean(0) - found.texts.double().mean(0)).norm())
    for name, rows in (("image", images), ("text", texts)):
        figures |= {f"{name}_uniformity": uniformity(setting, rows), f"{name}_effective_rank": effective_rank(rows)}
    figures["text_hubness"] = hubness(setting, images, texts)
    return figures | {"image_hubness": hubness(setting, texts, images)}


def uniformity(setting: Setting, rows: Tensor) -> float:
    """log of the mean of exp(-2 distance^2) over pairs of different rows. Collective.

    Args:
        rows: [N, D] unit norm, all of them on every rank; each rank takes its share of the pairs.
    """
    part, total = setting.share(len(rows)), rows.new_zeros(1, dtype=torch.float64)
    with setting.world.together("measuring uniformity"), interruptible(), torch.inference_mode():
        for start in range(part.start, part.stop, ROWS):
            block = rows[start : min(start + ROWS, part.stop)].double()
            for column in range(0, len(rows), COLUMNS):
                distances = 2 - 2 * block @ rows[column : column + COLUMNS].double().T
                near = (-2 * distances.clamp(min=0)).exp()
                if -len(near) < start - column < near.shape[1]:  # a row and itself
                    near.diagonal(start - column).zero_()
                total += near.sum()
    summed = setting.world.gather_rows(total.cpu()).sum()
    return float((summed / (len(rows) * (len(rows) - 1))).log())


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the covariance's eigenvalues: between 1 and D.

    Args:
        rows: [N, D].
    """
    centred = rows.double() - rows.double().mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum().clamp(min=1e-300)
    return float(torch.special.entr(shares).sum().exp())


def hubness(setting: Setting, queries: Tensor, candidates: Tensor) -> float:
    """Skewness of how often a candidate is among the 10 nearest of a query: 0 without hubs, high with few. Collective.

    Args:
        queries: [Q, D]; each rank takes its share.
        candidates: [M, D].
    """
    part, k = setting.share(len(queries)), min(NEIGHBOURS, len(candidates))
    counts = torch.zeros(len(candidates), dtype=torch.float64)
    with setting.world.together("looking for hubs"), interruptible(), torch.inference_mode():
        for start in range(part.start, part.stop, ROWS):
            nearest = _nearest(queries[start : min(start + ROWS, part.stop)], candidates, k).cpu().reshape(-1)
            counts += torch.bincount(nearest, minlength=len(candidates))
    counts = setting.world.gather_rows(counts[None]).sum(0)
    centred = counts - counts.mean()
    spread = centred.square().mean().sqrt()
    return float(centred.pow(3).mean() / spread**3) if spread > 0 else 0.0


def _nearest(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    """[q, k] numbers of the candidates with the highest scores, the lower number where scores are equal."""
    best = queries.new_empty(len(queries), 0, dtype=torch.float64)
    numbers = queries.new_empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(candidates), COLUMNS):
        scores = queries.double() @ candidates[start : start + COLUMNS].double().T
        own = torch.arange(start, start + scores.shape[1], device=queries.device).expand(len(queries), -1)
        both, of = torch.cat([best, scores], 1), torch.cat([numbers, own], 1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :k]
        best, numbers = both.gather(1, order), of.gather(1, order)
    return numbers
