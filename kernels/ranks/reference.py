"""Obviously right and never optimized: holds all scores, and which of them are relevant."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels.ranks.standing import Relevance, Standing


def rounded_scores(queries: Tensor, candidates: Tensor) -> Tensor:
    """Dot products [Q, M] such that equal candidates score equal: summed in fp64, rounded to fp32.

    A product in fp32 depends on where in the matrix it stands, by more than its last digit.
    """
    return (queries.double() @ candidates.double().T).float()


def ranks(queries: Tensor, candidates: Tensor, relevance: Relevance) -> Standing:
    scores = rounded_scores(queries, candidates)
    relevant = torch.zeros_like(scores, dtype=torch.bool)
    relevant[relevance.query, relevance.candidate] = True
    best, _ = relevance.best(scores[relevance.query, relevance.candidate], len(queries))
    higher, same = scores > best[:, None], scores == best[:, None]
    return Standing((higher & ~relevant).sum(1), (same & ~relevant).sum(1), (same & relevant).sum(1))
