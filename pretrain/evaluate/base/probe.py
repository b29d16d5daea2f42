"""Multinomial logistic regression by L-BFGS, from scikit-learn, with its regulariser chosen on held-out samples.

Source: Radford et al. 2021, appendix A.3 (arXiv:2103.00020): C from seven powers of ten, then halved steps around the
best one; at most 1000 iterations. Here on unit-norm features, and ranks fit different C at the same time.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from pretrain.errors import UserError
from pretrain.evaluate.base.labelled import Labelled
from pretrain.world import World

COARSE = tuple(range(-6, 7, 2))
"""log10 of C."""
HALVINGS = 4
ITERATIONS = 1000
SMALL = 10_000_000
"""Numbers up to which one thread is faster: 20 times, for 1,400 x 64 on a busy machine."""


def refuse_missing() -> None:
    """UserError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("probes need scikit-learn: pip install 'pretrain[digits]'") from None


def fit(train: Labelled, log_c: float) -> Any:
    """The classifier for C = 10**log_c, in fp64."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads() if train.features.size > SMALL else 1
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol ends after ITERATIONS, converged or not
        return LogisticRegression(C=10.0**log_c, max_iter=ITERATIONS).fit(
            train.features.astype(np.float64), train.labels
        )


def accuracy(train: Labelled, test: Labelled, log_c: float) -> float:
    """Share of the test samples that a classifier of the training samples is right about."""
    return float((predict(train, test, log_c) == test.labels).mean())


def predict(train: Labelled, test: Labelled, log_c: float) -> np.ndarray:
    """[N] labels."""
    found: np.ndarray = fit(train, log_c).predict(test.features.astype(np.float64))
    return found


def choose(train: Labelled, held_out: Labelled, world: World) -> tuple[float, float]:
    """(log10 of the best C, its accuracy on held_out); the smallest C of several best ones. Collective."""
    scores: dict[float, float] = {}
    _try([float(n) for n in COARSE], scores, train, held_out, world)
    step = 1.0
    for _ in range(HALVINGS):
        best = _best(scores)
        _try([best - step, best + step], scores, train, held_out, world)
        step /= 2
    return _best(scores), scores[_best(scores)]


def coarse(train: Labelled, held_out: Labelled) -> float:
    """log10 of the best of the seven powers. On this rank alone."""
    return _best({float(n): accuracy(train, held_out, n) for n in COARSE})


def _best(scores: dict[float, float]) -> float:
    return min(scores, key=lambda log_c: (-scores[log_c], log_c))


def _try(wanted: list[float], scores: dict[float, float], train: Labelled, held_out: Labelled, world: World) -> None:
    new = [log_c for log_c in wanted if log_c not in scores]
    own: dict[float, float] = {}
    with world.together("fitting a probe"):
        own = {log_c: accuracy(train, held_out, log_c) for log_c in new[world.rank :: world.size]}
    for part in world.share(own):
        scores |= part
