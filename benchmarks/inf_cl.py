"""Inf-CL's algorithm (Cheng et al. 2024, arXiv:2410.17243), restated from its description, for one process.

Each direction is a problem of its own: tiles of logits with a running log-sum-exp that is saved; backward computes the
logits once for the queries' gradient and once more for the keys'. Five matrix products a direction, ten in all, where
four would do. Everything is fp32, the features being scaled before they are widened; on a GPU the matrix products are
TF32. Tiles are torch's here, as large as ours, where the original runs a 64 x 64 Triton kernel: this measures the
algorithm, not that kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.kernels.tiling import products


def inf_cl_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Mean of the cross-entropies by image and by text.

    Args:
        image: [B, D]
        text: [B, D]
        scale: []

    Returns:
        [] fp32 nats
    """
    return (_one_direction(image, text, scale) + _one_direction(text, image, scale)) / 2


def _one_direction(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    scaled, keys = (scale * queries).to(queries.dtype).float(), keys.float()
    labels = torch.arange(len(queries), device=queries.device)
    positives = torch.einsum("bd,bd->b", scaled, keys[labels])
    sums: Tensor = _LogSumExp.apply(scaled, keys)
    return (sums - positives).mean()


class _LogSumExp(torch.autograd.Function):
    """[B] log of the sum over keys of exp(query . key)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        sums = queries.new_full((len(queries),), -torch.inf)
        with _tf32():
            for r, _, tile in products(queries, keys):
                sums[r] = torch.logaddexp(sums[r], tile.logsumexp(1))
        ctx.save_for_backward(queries, keys, sums)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, sums = ctx.saved_tensors
        d_queries, d_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        with _tf32():
            for r, c, tile in products(queries, keys):
                d_queries[r].addmm_(_weighed(tile, sums[r], upstream[r]), keys[c])
            for r, c, tile in products(queries, keys):
                d_keys[c].addmm_(_weighed(tile, sums[r], upstream[r]).t(), queries[r])
        return d_queries, d_keys


def _weighed(tile: Tensor, sums: Tensor, upstream: Tensor) -> Tensor:
    return tile.sub_(sums[:, None]).exp_().mul_(upstream[:, None])


@contextmanager
def _tf32() -> Iterator[None]:
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        yield
    finally:
        backend.fp32_precision = before
