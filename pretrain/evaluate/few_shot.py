"""Few-shot: a probe that learns from k images of each class, for several k and several draws of them.

Source: the linear probe of Radford et al. 2021 (arXiv:2103.00020), its regulariser chosen on min(k, 4) further images
of a class, as in Zhou et al. 2022 (CoOp, arXiv:2109.01134).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrain.errors import UserError
from pretrain.evaluate.base import Setting, probe
from pretrain.evaluate.base.labelled import Labelled
from pretrain.evaluate.linear_probe import samples

READS, LEARNS = ("shards", "folders"), True
SHOTS, DRAWS, MAX_HELD_BACK = (1, 2, 4, 8, 16), 3, 4


def measure(setting: Setting) -> dict[str, Any]:
    """For each k that every class has images for, the mean of top1 over the draws, and its deviation. Collective.

    Raises:
        UserError: as linear_probe, or some class has not two images.
    """
    train, test = samples(setting, "few_shot")
    smallest = int(np.unique(train.labels, return_counts=True)[1].min())
    shots = [k for k in SHOTS if k + min(k, MAX_HELD_BACK) <= smallest]
    if not shots:
        raise UserError("few_shot: some class of data.train has one image alone; it needs two, to learn and to choose")
    cases = [(k, draw) for k in shots for draw in range(DRAWS)]
    own: dict[tuple[int, int], float] = {}
    with setting.world.together("fitting probes"):
        own = {case: _accuracy(train, test, *case) for case in cases[setting.world.rank :: setting.world.size]}
    scores = {case: score for part in setting.world.share(own) for case, score in part.items()}
    found: dict[str, Any] = {"samples": len(test.labels), "classes": len(np.unique(train.labels)), "draws": DRAWS}
    for k in shots:
        values = [scores[k, draw] for draw in range(DRAWS)]
        found |= {f"top1_{k}_shot": float(np.mean(values)), f"top1_{k}_shot_std": float(np.std(values))}
    return found


def drawn(labels: np.ndarray, k: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from, k of each class, and min(k, 4) others to choose by; functions of the arguments alone."""
    rng = np.random.default_rng((k, draw))
    learn, choose = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        learn.append(rows[:k])
        choose.append(rows[k : k + min(k, MAX_HELD_BACK)])
    return np.concatenate(learn), np.concatenate(choose)


def _accuracy(train: Labelled, test: Labelled, k: int, draw: int) -> float:
    learn, choose = drawn(train.labels, k, draw)
    return probe.accuracy(train.at(learn), test, probe.coarse(train.at(learn), train.at(choose)))
