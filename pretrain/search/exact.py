"""The rows with the highest scores, exactly, in bounded memory: blocks of rows by blocks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.search.index import BLOCK, Index

QUERIES = 256
"""Queries that are looked at together: never more than QUERIES x BLOCK scores are there."""
_LOW = (1 << 32) - 1


def search(index: Index, queries: Tensor, k: int, rows: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The k best rows of each query; of equal scores the lower row is better.

    Args:
        queries: [Q, D] fp32, on the device to work on.
        rows: rows in a block.

    Returns:
        [Q, min(k, N)] fp32 scores, descending, and int64 rows; on the CPU.
    """
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first, block in index.blocks(rows):
        moved = block.to(queries.device)
        parts = [_merged(best[start : start + QUERIES], queries[start : start + QUERIES] @ moved.T, first, k)
                 for start in range(0, len(queries), QUERIES)]  # fmt: skip
        best = torch.cat(parts) if parts else best
    return _scores(best).cpu(), (_LOW - (best & _LOW)).cpu()


def _merged(best: Tensor, scores: Tensor, first: int, k: int) -> Tensor:
    """[Q, <= k] keys, descending."""
    rows = torch.arange(first, first + scores.shape[1], device=scores.device)
    keys = (_ordered((scores + 0.0).view(torch.int32)).long() << 32) | (_LOW - rows)
    own = keys.topk(min(k, keys.shape[1]), dim=1).values
    both = torch.cat([best, own], 1)
    return both.topk(min(k, both.shape[1]), dim=1).values


def _ordered(bits: Tensor) -> Tensor:
    """Bits of fp32 numbers <-> integers in the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _scores(keys: Tensor) -> Tensor:
    """The score in the upper half of each key, under which the lower half puts lower rows first."""
    return _ordered((keys >> 32).int()).view(torch.float32)
