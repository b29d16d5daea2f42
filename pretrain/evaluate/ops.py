"""Ranking arithmetic, apart from any model or file: where the best relevant candidate of each query stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK, CANDIDATE_BLOCK, PAIR_BLOCK = 256, 2048, 8192
"""Scores that exist at one moment: never queries x candidates."""


@dataclass(frozen=True)
class Relevance:
    """Which candidates answer which queries, as pairs of numbers."""

    query: Tensor
    """[P] int64, ascending."""
    candidate: Tensor
    """[P] int64."""

    @staticmethod
    def of(query: Tensor, candidate: Tensor) -> Relevance:
        """Pairs in any order, repeated or not."""
        pairs = torch.unique(torch.stack([query, candidate], 1), dim=0)
        return Relevance(pairs[:, 0].contiguous(), pairs[:, 1].contiguous())

    def rows(self, start: int, stop: int) -> Relevance:
        """The pairs of queries start to stop - 1, numbered from 0."""
        first, last = torch.searchsorted(self.query, torch.tensor([start, stop], device=self.query.device)).tolist()
        return Relevance(self.query[first:last] - start, self.candidate[first:last])


@dataclass(frozen=True)
class Standing:
    """Where the best relevant candidate of each query stands among the others."""

    greater: Tensor
    """[Q] int64: irrelevant candidates with a higher score."""
    ties: Tensor
    """[Q] int64: irrelevant candidates with the same score."""
    equals: Tensor
    """[Q] int64, at least 1: relevant candidates with that score."""

    def recall(self, k: int) -> Tensor:
        """[Q] fp64: probability that a relevant candidate is among the first k, equal scores in random order.

        A tower that maps everything to one point so gets the recall of guessing, not 100 %.
        """
        free = (k - self.greater).clamp(min=0)
        missed = torch.ones(len(self.greater), dtype=torch.float64, device=self.greater.device)
        for place in range(k):
            left = (self.ties - place).clamp(min=0).double() / (self.ties + self.equals - place).clamp(min=1)
            missed *= torch.where(place < free, left, 1.0)
        return 1 - missed

    def rank(self) -> Tensor:
        """[Q] fp64: expected place, from 1, of the best relevant candidate, equal scores in random order."""
        return 1 + self.greater + self.ties.double() / (self.equals + 1)


def rounded_scores(queries: Tensor, candidates: Tensor) -> Tensor:
    """Dot products [Q, C] such that equal candidates score equal: summed in fp64, rounded to fp32.

    A product in fp32 depends on where in the matrix it stands, by more than its last digit.
    """
    return (queries.double() @ candidates.double().T).float()


def standing(queries: Tensor, candidates: Tensor, relevance: Relevance) -> Standing:
    """Rank the best relevant candidate of each query, block by block.

    Args:
        queries: [Q, D] any float dtype, any device.
        candidates: [C, D] the same.
        relevance: at least one pair for each query, on the same device.

    Raises:
        ValueError: a query has no relevant candidate.
    """
    parts = [
        _standing(queries[start : start + QUERY_BLOCK], candidates, relevance.rows(start, start + QUERY_BLOCK))
        for start in range(0, len(queries), QUERY_BLOCK)
    ]
    empty = torch.empty(0, dtype=torch.int64, device=queries.device)
    columns = zip(*((part.greater, part.ties, part.equals) for part in parts), strict=True)
    return Standing(*(torch.cat(column) for column in columns)) if parts else Standing(empty, empty, empty)


def _standing(queries: Tensor, candidates: Tensor, relevance: Relevance) -> Standing:
    own = _pair_scores(queries, candidates, relevance)
    best = own.new_full((len(queries),), -torch.inf).scatter_reduce(0, relevance.query, own, "amax")
    if torch.isneginf(best).any():
        raise ValueError(f"query {int(torch.isneginf(best).nonzero()[0])} of this block has no relevant candidate")
    equals = torch.zeros_like(best, dtype=torch.int64).index_add(
        0, relevance.query, (own == best[relevance.query]).long()
    )
    greater, ties = torch.zeros_like(equals), torch.zeros_like(equals)
    for start in range(0, len(candidates), CANDIDATE_BLOCK):
        scores = rounded_scores(queries, candidates[start : start + CANDIDATE_BLOCK])
        inside = (relevance.candidate >= start) & (relevance.candidate < start + CANDIDATE_BLOCK)
        scores[relevance.query[inside], relevance.candidate[inside] - start] = -torch.inf
        greater += (scores > best[:, None]).sum(1)
        ties += (scores == best[:, None]).sum(1)
    return Standing(greater, ties, equals)


def _pair_scores(queries: Tensor, candidates: Tensor, relevance: Relevance) -> Tensor:
    """[P] fp32: scores of the relevant pairs, as `rounded_scores` gives them."""
    scores = queries.new_empty(len(relevance.query), dtype=torch.float32)
    for start in range(0, len(scores), PAIR_BLOCK):
        part = slice(start, start + PAIR_BLOCK)
        products = queries[relevance.query[part]].double() * candidates[relevance.candidate[part]].double()
        scores[part] = products.sum(1)
    return scores
