"""The same block by block: what exists at one moment is one block of scores and the features of one block in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels.ranks.reference import rounded_scores
from pretrain.kernels.ranks.standing import Relevance, Standing

QUERY_BLOCK, CANDIDATE_BLOCK = 256, 2048
"""Scores that exist at one moment: never queries x candidates."""


def ranks(queries: Tensor, candidates: Tensor, relevance: Relevance) -> Standing:
    counts = queries.new_zeros(3, len(queries), dtype=torch.int64)
    own = _pair_scores(queries, candidates, relevance)
    best, counts[2] = relevance.best(own, len(queries))
    for start in range(0, len(queries), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        pairs = relevance.rows(start, start + QUERY_BLOCK)
        counts[:2, block] = _irrelevant(queries[block], candidates, pairs, best[block, None])
    return Standing(*counts)


def _irrelevant(queries: Tensor, candidates: Tensor, relevance: Relevance, best: Tensor) -> Tensor:
    """[2, Q] int64: irrelevant candidates above and at the best relevant score of each query."""
    counts = queries.new_zeros(2, len(queries), dtype=torch.int64)
    for start in range(0, len(candidates), CANDIDATE_BLOCK):
        scores = rounded_scores(queries, candidates[start : start + CANDIDATE_BLOCK])
        inside = (relevance.candidate >= start) & (relevance.candidate < start + CANDIDATE_BLOCK)
        scores[relevance.query[inside], relevance.candidate[inside] - start] = -torch.inf
        counts[0] += (scores > best).sum(1)
        counts[1] += (scores == best).sum(1)
    return counts


def _pair_scores(queries: Tensor, candidates: Tensor, relevance: Relevance) -> Tensor:
    """[P] fp32: scores of the relevant pairs, as `rounded_scores` gives them."""
    scores = queries.new_empty(len(relevance.query), dtype=torch.float32)
    size = max(1, QUERY_BLOCK * CANDIDATE_BLOCK // queries.shape[1])
    for start in range(0, len(scores), size):
        part = slice(start, start + size)
        products = queries[relevance.query[part]].double() * candidates[relevance.candidate[part]].double()
        scores[part] = products.sum(1)
    return scores
