"""Linear probe: logistic regression on frozen image features, tested on held-out samples.

Every fifth training sample of a class chooses the regulariser; the classifier is then fitted to all. `base.probe` tells
the protocol.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrain.errors import UserError
from pretrain.evaluate.base import Setting, probe
from pretrain.evaluate.base.labelled import Labelled, labelled

READS, LEARNS = ("shards", "folders"), True
HELD_BACK = 5


def measure(setting: Setting) -> dict[str, Any]:
    """top1, mean over classes, log10 of the C chosen and the accuracy it was chosen for. Collective.

    Raises:
        UserError: scikit-learn is missing, there are no training samples, or one has no label.
    """
    train, test = samples(setting, "linear_probe")
    kept = held_back(train.labels)
    log_c, validation = probe.choose(train.at(~kept), train.at(kept), setting.world)
    found = np.empty(0)
    with setting.world.together("fitting a probe"):
        found = probe.predict(train, test, log_c) if setting.world.is_main else found
    predicted = setting.world.share(found)[0]
    right = predicted == test.labels
    each = [float(right[test.labels == label].mean()) for label in np.unique(test.labels)]
    counts = {"samples": len(test.labels), "train_samples": len(train.labels), "classes": len(np.unique(train.labels))}
    figures = {"top1": float(right.mean()), "mean_per_class": float(np.mean(each))}
    return counts | figures | {"log10_c": log_c, "validation_top1": validation}


def samples(setting: Setting, task: str) -> tuple[Labelled, Labelled]:
    """(training, held-out) features with labels. Collective.

    Raises:
        UserError: as `measure`.
    """
    with setting.world.together(f"preparing {task}"):
        probe.refuse_missing()
        if setting.train is None:
            raise UserError(f"{task} needs labelled samples to learn from: name them with --train, or in data.train")
    assert setting.train is not None
    train, test = labelled(setting, setting.train, "data.train"), labelled(setting, setting.batches, "data.eval")
    if len(np.unique(train.labels)) < 2:
        raise UserError(f"{task}: data.train holds a single class; a probe needs two")
    return train, test


def held_back(labels: np.ndarray) -> np.ndarray:
    """[N] bool: every fifth sample of a class of at least five, the same ones each time; at least one sample.

    Args:
        labels: [N] int64.
    """
    kept = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        kept[np.flatnonzero(labels == label)[HELD_BACK - 1 :: HELD_BACK]] = True
    if not kept.any():
        raise UserError(f"data.train: no class has {HELD_BACK} samples, by which a probe chooses its regulariser")
    return kept
