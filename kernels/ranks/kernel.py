# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The same in Triton: scores live in registers, one tile at a time, and leave as two counts a query.

A score must not depend on where in a tile it stands, and a pair's own score must be the bits that the counting sweep
sees: equal bits are what a tie is. Both hold because every score, in either kernel, comes from `_tile`: one chain of
fp32 multiply-adds over the features in ascending order, which ieee precision gives and the matrix units do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pretrain.kernels.ranks.standing import Relevance, Standing

EDGE, FEATURES = 64, 32
"""A tile is EDGE queries x EDGE candidates, from FEATURES features at a time, in both kernels."""
WARPS = 4
PROGRAMS_PER_PROCESSOR = 12
"""Programs that the sweep is split into, so that a few queries keep a whole GPU busy too."""


@triton.jit
def _tile(queries, q, candidates, c, width, EDGE: tl.constexpr, FEATURES: tl.constexpr):
    """Scores [EDGE, EDGE] fp32 of rows q and rows c, which exist; width is a multiple of FEATURES."""
    k = tl.arange(0, FEATURES)
    rows = queries + q.to(tl.int64)[:, None] * width + k[None, :]
    columns = candidates + c.to(tl.int64)[None, :] * width + k[:, None]
    scores = tl.zeros((EDGE, EDGE), dtype=tl.float32)
    for start in range(0, width, FEATURES):
        left, right = tl.load(rows + start).to(tl.float32), tl.load(columns + start).to(tl.float32)
        scores = tl.dot(left, right, scores, input_precision="ieee")
    return scores


@triton.jit
def _score_pairs(
    queries, candidates, query, candidate, scores, pairs, width, EDGE: tl.constexpr, FEATURES: tl.constexpr
):
    """scores[p] = queries[query[p]] . candidates[candidate[p]]: the diagonal of a tile of gathered rows."""
    lane = tl.arange(0, EDGE)
    pair = tl.program_id(0).to(tl.int64) * EDGE + lane
    known = tl.minimum(pair, pairs - 1)
    tile = _tile(queries, tl.load(query + known), candidates, tl.load(candidate + known), width, EDGE, FEATURES)
    own = tl.sum(tl.where(lane[:, None] == lane[None, :], tile, 0.0), axis=1)
    tl.store(scores + pair, own, mask=pair < pairs)


@triton.jit
def _count(
    queries,
    candidates,
    best,
    counts,
    num_queries,
    num_candidates,
    width,
    share,
    EDGE: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """counts[s, 0, q] and counts[s, 1, q]: candidates of share s with a score above and at best[q]."""
    q = tl.program_id(0).to(tl.int64) * EDGE + tl.arange(0, EDGE)
    row = tl.minimum(q, num_queries - 1)
    own = tl.load(best + row)
    first = tl.program_id(1).to(tl.int64) * share
    above, at = tl.zeros((EDGE,), dtype=tl.int32), tl.zeros((EDGE,), dtype=tl.int32)
    for start in range(0, share, EDGE):
        c = first + start + tl.arange(0, EDGE)
        tile = _tile(queries, row, candidates, tl.minimum(c, num_candidates - 1), width, EDGE, FEATURES)
        exists = (c < num_candidates)[None, :]
        above += tl.sum(((tile > own[:, None]) & exists).to(tl.int32), axis=1)
        at += tl.sum(((tile == own[:, None]) & exists).to(tl.int32), axis=1)
    line = counts + tl.program_id(1).to(tl.int64) * 2 * num_queries + q
    tl.store(line, above, mask=q < num_queries)
    tl.store(line + num_queries, at, mask=q < num_queries)


def ranks(queries: Tensor, candidates: Tensor, relevance: Relevance) -> Standing:
    queries, candidates = _whole_steps(queries), _whole_steps(candidates)
    best, equals = relevance.best(_pair_scores(queries, candidates, relevance), len(queries))
    above, at = _counts(queries, candidates, best)
    ties = at - equals  # no relevant candidate is above the best of them, and `equals` are at it
    if (ties < 0).any():
        raise RuntimeError("a pair's own score is not the one the sweep saw: this compiler orders its sums otherwise")
    return Standing(above, ties, equals)


def _whole_steps(features: Tensor) -> Tensor:
    """[N, D] -> contiguous [N, multiple of FEATURES]; the zeros change no sum."""
    missing = -features.shape[1] % FEATURES
    return F.pad(features, (0, missing)) if missing else features.contiguous()


def _pair_scores(queries: Tensor, candidates: Tensor, relevance: Relevance) -> Tensor:
    """[P] fp32."""
    pairs = len(relevance.query)
    scores = torch.empty(pairs, dtype=torch.float32, device=queries.device)
    if pairs:
        _score_pairs[(triton.cdiv(pairs, EDGE),)](
            queries,
            candidates,
            relevance.query.contiguous(),
            relevance.candidate.contiguous(),
            scores,
            pairs,
            queries.shape[1],
            EDGE,
            FEATURES,
            num_warps=WARPS,
        )
    return scores


def _counts(queries: Tensor, candidates: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates above and at the best relevant score of each query, [Q] int64 both."""
    rows, blocks = triton.cdiv(len(queries), EDGE), triton.cdiv(len(candidates), EDGE)
    share = EDGE * triton.cdiv(blocks, max(1, _programs(queries.device) // max(1, rows)))
    shares = triton.cdiv(len(candidates), max(1, share))
    counts = torch.empty(shares, 2, len(queries), dtype=torch.int32, device=queries.device)
    if counts.numel():
        _count[(rows, shares)](
            queries,
            candidates,
            best,
            counts,
            len(queries),
            len(candidates),
            queries.shape[1],
            share,
            EDGE,
            FEATURES,
            num_warps=WARPS,
        )
    above, at = counts.sum(0, dtype=torch.int64)
    return above, at


def _programs(device: torch.device) -> int:
    """How many programs fill a device; the interpreter's one processor takes shares as well, to show that they add."""
    if device.type != "cuda":
        return PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
