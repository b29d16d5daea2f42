"""Forward and backward of one optimizer step: the plain form, and the cached-feature form for what exceeds memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pretrain.engines.base import Engine
from pretrain.exchange.base import Exchange
from pretrain.objectives.base import Objective
from pretrain.phases import phase
from pretrain.precision import full_precision
from pretrain.seed import Replay
from pretrain.values import Batch, Features, Pairs, Terms


def plain_step(engine: Engine, objectives: list[Objective], exchange: Exchange, batch: Batch) -> tuple[Terms, Features]:
    """Gradients of the loss of the global batch, every tower seeing this rank's rows at once."""
    features = engine.forward(batch, partial(exchange.announce, losses=len(objectives)))
    terms = loss_terms(objectives, Pairs(features, exchange, batch.ids, batch.columns))
    with phase("backward"):
        engine.backward(total(terms))
    return terms, features


def cached_step(
    engine: Engine, objectives: list[Objective], exchange: Exchange, batch: Batch, micro_batch: int
) -> tuple[Terms, Features]:
    """The same gradients with `micro_batch` rows in the towers at a time; the loss still sees the global batch, once.

    Features of all parts first, without gradients; the loss and its gradient with respect to features, scale and
    bias; then the towers again, part by part with the same randomness, pulling that gradient through. Scale and bias
    take theirs with the last part alone. Source: Gao et al. 2021, GradCache (arXiv:2101.06983).
    """
    parts, replays = batch.split(micro_batch), []
    cached: list[Features] = []
    for part in parts:
        replays.append(Replay())
        with torch.no_grad(), replays[-1].record():
            cached.append(engine.forward(part))
    leaves = join(cached)
    terms = loss_terms(objectives, Pairs(leaves, exchange, batch.ids, batch.columns))
    with phase("loss"):
        torch.autograd.backward(total(terms))
    start = 0
    for part, replay in zip(parts, replays, strict=True):
        last = start + len(part) == len(batch)
        with engine.averaging(last), replay.again():
            pulled = pull(engine.forward(part), leaves, start, shared=last)
            with phase("backward"):
                engine.backward(pulled)
        start += len(part)
    return terms, leaves


def loss_terms(objectives: list[Objective], pairs: Pairs) -> Terms:
    """Every objective's terms, in fp32 whatever surrounds it; a name that two of them use is prefixed."""
    terms: Terms = {}
    with phase("loss"), full_precision(pairs.image.device):
        for objective in objectives:
            for name, term in objective(pairs).items():
                terms[name if name not in terms else f"{type(objective).__name__.lower()}/{name}"] = term
    return terms


def total(terms: Terms) -> Tensor:
    """The loss: the sum of all terms."""
    return torch.stack(list(terms.values())).sum()


def join(parts: list[Features]) -> Features:
    """One batch's features from its parts, as leaves that collect gradients; scale and bias are those of any part."""
    rows = {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].rows()}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in (parts[0].tensors() | rows).items()}
    return Features.of(leaves)


def pull(features: Features, leaves: Features, start: int, shared: bool) -> Tensor:
    """A scalar whose gradient with respect to `features` is what the leaves collected for these rows.

    Args:
        features: of rows [start, start + B) of the leaves.
        shared: whether scale and bias take their gradient here; exactly one part's does.
    """
    stop = start + len(features.image)
    grads = {name: leaf.grad for name, leaf in leaves.tensors().items() if leaf.grad is not None}
    rows, named = features.rows(), features.tensors()
    pulled = [(named[name] * grad[start:stop]).sum() for name, grad in grads.items() if name in rows]
    if shared:
        pulled += [named[name] * grad for name, grad in grads.items() if name not in rows]
    return torch.stack(pulled).sum()
