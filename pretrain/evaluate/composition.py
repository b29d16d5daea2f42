"""Composition: whether an image lies nearer to its caption than to the same words wrongly put together.

A question is answered where the right caption's score exceeds every wrong one's; equal scores are no answer, so towers
that tell no captions apart get 0. Sources: SugarCrepe, Hsieh et al. 2023 (arXiv:2306.14610), accuracy of each kind of
change; ARO, Yuksekgonul et al. 2023 (arXiv:2210.01936), mean over relations or attributes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.data.evaluation import EvalBatch
from pretrain.errors import UserError
from pretrain.evaluate.base import Setting
from pretrain.evaluate.base.published import Choice
from pretrain.signals import interruptible

READS = ("composition",)
Group = tuple[str, str | None]


def measure(setting: Setting) -> dict[str, Any]:
    """Accuracy, its mean over files, and of each file; of ARO's the mean over groups, and each. Collective.

    Raises:
        UserError: there are no questions.
    """
    asked, right = Counter[Group](), Counter[Group]()
    with setting.world.together("asking about composition"), interruptible(), torch.inference_mode():
        for batch in setting.batches:
            choices: list[Choice] = [setting.records[number] for number in batch.numbers]
            for choice, answered in zip(choices, answers(setting, batch, choices), strict=True):
                asked[choice.name, choice.group] += 1
                right[choice.name, choice.group] += answered
    parts = setting.world.share((asked, right))
    asked, right = (sum((part[n] for part in parts), Counter[Group]()) for n in (0, 1))
    if not asked:
        raise UserError("there are no questions in data.eval")
    return _metrics(asked, right)


def answers(setting: Setting, batch: EvalBatch, choices: list[Choice]) -> Iterator[bool]:
    """For each image whether its first caption scores highest."""
    images = setting.images(batch)
    texts = setting.texts([text for choice in choices for text in choice.texts])
    parts: tuple[Tensor, ...] = torch.split(texts, [len(choice.texts) for choice in choices])
    for image, captions in zip(images, parts, strict=True):
        scores = (captions.double() @ image.double()).float()
        yield bool((scores[0] > scores[1:]).all())


def _metrics(asked: Counter[Group], right: Counter[Group]) -> dict[str, Any]:
    files: dict[str, list[Group]] = defaultdict(list)
    for group in sorted(asked, key=repr):
        files[group[0]].append(group)
    per_file = {name: _share(groups, asked, right) for name, groups in files.items()}
    found: dict[str, Any] = {
        "samples": asked.total(),
        "accuracy": right.total() / asked.total(),
        "mean_per_file": sum(per_file.values()) / len(per_file),
        "per_file": per_file,
    }
    grouped = {name: {str(of): right[name, of] / asked[name, of] for _, of in groups if of is not None}
               for name, groups in files.items()}  # fmt: skip
    grouped = {name: each for name, each in grouped.items() if each}
    if grouped:
        found["mean_per_group"] = {name: sum(each.values()) / len(each) for name, each in grouped.items()}
        found["per_group"] = grouped
    return found


def _share(groups: list[Group], asked: Counter[Group], right: Counter[Group]) -> float:
    return sum(right[group] for group in groups) / sum(asked[group] for group in groups)
