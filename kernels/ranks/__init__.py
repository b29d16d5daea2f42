"""Retrieval ranks of many queries among many candidates, without their scores, equal scores counted fairly.

The place in a sorted row, as evaluations commonly take it, depends on how equal scores happen to be sorted; counts do
not. Equal candidates have equal scores here, wherever they stand, in each form: the torch forms sum in fp64 and round
to fp32, the Triton form sums in fp32, every score in the same order. Two candidates whose scores differ by less than
fp32 resolves may so tie in one form and not in the other. Memory: O((Q + M) D) and one tile.

Source: recall@k as in Karpathy and Fei-Fei 2015, section 4.2 (arXiv:1412.2306), with the expectation over random orders
of ties as in McSherry and Najork 2008, section 3 (doi:10.1007/978-3-540-78646-7_38).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.kernels.dispatch import Impl, choose, device_of, load
from pretrain.kernels.ranks.standing import Relevance, Standing

__all__ = ["Relevance", "Standing", "ranks"]

NAME = "ranks"


@torch.no_grad()
def ranks(queries: Tensor, candidates: Tensor, relevance: Relevance | None = None, impl: Impl = "auto") -> Standing:
    """Five lines of torch, without their [Q, M] scores::

        scores = queries @ candidates.T
        relevant = zeros(Q, M).bool(); relevant[relevance.query, relevance.candidate] = True
        best = scores.where(relevant, -inf).amax(1, keepdim=True)
        greater, ties = ((scores > best) & ~relevant).sum(1), ((scores == best) & ~relevant).sum(1)
        equals = ((scores == best) & relevant).sum(1)

    Args:
        queries: [Q, D], any float dtype.
        candidates: [M, D], the same dtype and device. A score that is not a number ranks below all.
        relevance: at least one pair for each query, on the same device; None where candidate i answers query i.
        impl: auto takes the fastest form that runs here.

    Returns:
        Counts [Q] int64: `.rank()` is the expected place, `.recall(k)` the chance to be among the first k. No gradient.

    Raises:
        ValueError: shapes, dtypes, devices or relevance do not fit, a query has no relevant candidate or an infinite or
            undefined score with its best one, or `impl` cannot run here.
    """
    _check(queries, candidates)
    if relevance is None:
        if len(queries) > len(candidates):
            raise ValueError(f"{len(queries)} queries have no partner each among {len(candidates)} candidates")
        relevance = Relevance.one_to_one(queries)
    relevance.check(len(queries), len(candidates), queries.device)
    with device_of(queries):
        standing: Standing = load(NAME, choose(NAME, impl, queries)).ranks(queries, candidates, relevance)
    return standing


def _check(queries: Tensor, candidates: Tensor) -> None:
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1] or not queries.shape[1]:
        raise ValueError(
            f"queries {list(queries.shape)} and candidates {list(candidates.shape)} must be [Q, D] and [M, D], D >= 1"
        )
    if queries.dtype != candidates.dtype or not queries.is_floating_point():
        raise ValueError(f"queries {queries.dtype} and candidates {candidates.dtype} must share one floating dtype")
    if queries.device != candidates.device:
        raise ValueError(f"queries on {queries.device} and candidates on {candidates.device} must be on one device")
