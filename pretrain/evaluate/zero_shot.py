"""Zero-shot classification: an image belongs to the class whose prompts lie nearest.

A class is the normalised mean of the normalised features of its name in every template (Radford et al. 2021, section
3.1.4, arXiv:2103.00020; the formula of open_clip's build_zero_shot_classifier).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.evaluation import EvalBatch
from pretrain.errors import UserError
from pretrain.evaluate.base import Setting, split
from pretrain.evaluate.base.classes import Classes, choose
from pretrain.kernels.ranks import Relevance, ranks
from pretrain.signals import interruptible

READS = ("shards", "folders")


def measure(setting: Setting) -> dict[str, Any]:
    """Accuracy on this world's held-out samples: top1, top5 (of more than 5 classes), mean over classes, each class.

    Equal scores count as a fair guess among them. Collective.

    Raises:
        UserError: there is no classes.json, or a sample has no label or one without a name.
    """
    with setting.world.together("reading the classes"):
        if setting.classes is None:
            raise UserError(
                "zero_shot needs classes.json beside the shards' folder; put it there or name it with --classes "
                "(class folders: --classes folders)"
            )
        classes = choose(setting.classes, setting.templates, setting.folders)
    weights = classifier(setting, classes)
    counts = torch.zeros(len(classes.names), 3, dtype=torch.float64)
    with setting.world.together("classifying held-out samples"), interruptible(), torch.inference_mode():
        for batch in setting.batches:
            labels = torch.tensor(_labels(batch, len(classes.names)), dtype=torch.int64)
            counts.index_add_(0, labels, hits(setting.images(batch), weights, labels.to(weights.device)).cpu())
    totals = setting.world.gather_rows(counts[None]).sum(0)
    return _metrics(totals, classes.names)


def classifier(setting: Setting, classes: Classes) -> Tensor:
    """[C, D] fp32 on the world's device, unit norm; the ranks share the work, or it was done before. Collective."""
    found = setting.cache.tensor("classes", (classes.names, classes.templates), lambda: _encoded(setting, classes))
    return found.to(setting.world.device)


def _encoded(setting: Setting, classes: Classes) -> Tensor:
    own = setting.share(len(classes.names))
    parts = [torch.empty(0, setting.width)]
    with setting.world.together("encoding the classes"), interruptible(), torch.inference_mode():
        for names in split([classes.names[n] for n in own], max(1, setting.batch_size // len(classes.templates))):
            features = setting.texts([prompt for name in names for prompt in classes.prompts(name)])
            mean = features.reshape(len(names), len(classes.templates), -1).mean(1)
            parts.append(F.normalize(mean, dim=-1).cpu())
    return setting.world.gather_rows(torch.cat(parts))


def hits(images: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """What each sample adds to the counts.

    Args:
        images: [B, D] unit norm.
        weights: [C, D] unit norm.
        labels: [B] int64.

    Returns:
        [B, 3] fp64: 1, top-1 hit, top-5 hit; fractions where scores are equal.
    """
    standing = ranks(images, weights, Relevance(torch.arange(len(labels), device=labels.device), labels))
    return torch.stack([torch.ones_like(standing.rank()), standing.recall(1), standing.recall(5)], 1)


def _labels(batch: EvalBatch, num_classes: int) -> list[int]:
    for label, key in zip(batch.labels, batch.keys, strict=True):
        if label is None:
            raise UserError(f"{key} has no label, which zero_shot needs: put an integer 'label' into its json member")
        if not 0 <= label < num_classes:
            raise UserError(f"{key} has label {label}, but the classes named are 0 to {num_classes - 1}")
    return [label for label in batch.labels if label is not None]


def _metrics(totals: Tensor, names: list[str]) -> dict[str, Any]:
    samples, top1, top5 = totals.sum(0).tolist()
    if not samples:
        raise UserError("there are no held-out samples: check data.eval")
    seen = totals[:, 0] > 0
    each = totals[:, 1] / totals[:, 0].clamp(min=1)
    found: dict[str, Any] = {"samples": int(samples), "classes": len(names), "top1": top1 / samples}
    if len(names) > 5:
        found["top5"] = top5 / samples
    found["mean_per_class"] = float(each[seen].mean())
    found["per_class"] = {name: float(value) for name, value, known in zip(names, each, seen, strict=True) if known}
    return found
