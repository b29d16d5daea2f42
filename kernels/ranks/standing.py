"""Relevance and standing: which candidates answer which queries, and where the best answer of each query stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Relevance:
    """Which candidates answer which queries, as pairs of numbers."""

    query: Tensor
    """[P] int64, ascending."""
    candidate: Tensor
    """[P] int64, ascending within a query, none twice."""

    @staticmethod
    def of(query: Tensor, candidate: Tensor) -> Relevance:
        """Pairs in any order, repeated or not."""
        pairs = torch.unique(torch.stack([query, candidate], 1), dim=0)
        return Relevance(pairs[:, 0].contiguous(), pairs[:, 1].contiguous())

    @staticmethod
    def one_to_one(queries: Tensor) -> Relevance:
        """Candidate i answers query i, for as many as there are queries [Q, ...], on their device."""
        number = torch.arange(len(queries), device=queries.device)
        return Relevance(number, number)

    def rows(self, start: int, stop: int) -> Relevance:
        """The pairs of queries start to stop - 1, numbered from 0."""
        first, last = torch.searchsorted(self.query, torch.tensor([start, stop], device=self.query.device)).tolist()
        return Relevance(self.query[first:last] - start, self.candidate[first:last])

    def check(self, queries: int, candidates: int, device: torch.device) -> None:
        """Raise ValueError unless each pair is on the device, exists, stands in order, once, and each query has one."""
        shapes = [(list(x.shape), x.dtype) for x in (self.query, self.candidate)]
        if shapes != [([self.query.numel()], torch.int64)] * 2:
            raise ValueError(f"relevance {shapes} must be two of [P] int64")
        if {self.query.device, self.candidate.device} != {device}:
            raise ValueError(f"relevance on {self.query.device} and {self.candidate.device} must be on {device}")
        for name, numbers, count in (("query", self.query, queries), ("candidate", self.candidate, candidates)):
            lowest, highest = (int(x) for x in numbers.aminmax()) if len(numbers) else (0, -1)
            if lowest < 0 or highest >= count:
                raise ValueError(f"relevance names {name} {lowest} to {highest}, but there are {count}")
        place = self.query * candidates + self.candidate
        if (place[1:] <= place[:-1]).any():
            raise ValueError("relevance must be in ascending order without repeats: make it with Relevance.of")
        if not (answers := torch.bincount(self.query, minlength=queries)).all():
            raise ValueError(f"query {int((answers == 0).nonzero()[0])} has no relevant candidate")

    def best(self, scores: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        """What the relevant candidates alone say.

        Args:
            scores: [P] of the pairs.
            queries: Q.

        Returns:
            best [Q], the highest score of each query's pairs; equals [Q] int64, how many pairs have it.

        Raises:
            ValueError: a best score is infinite or not a number.
        """
        best = scores.new_full((queries,), -torch.inf).scatter_reduce(0, self.query, scores, "amax")
        if not (finite := best.isfinite()).all():
            first = int((~finite).nonzero()[0])
            raise ValueError(f"query {first} scores {float(best[first])} with its relevant candidate: not finite")
        equals = torch.zeros(queries, dtype=torch.int64, device=scores.device)
        return best, equals.index_add_(0, self.query, (scores == best[self.query]).long())


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
