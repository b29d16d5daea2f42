"""Conditional similarity: which picture of a gallery resembles a reference under a condition in words.

Source: GeneCIS, Vaze et al. 2023 (arXiv:2306.07969): recall@1, 2, 3 among a question's own gallery, for queries made of
the image, of the text, and of the mean of both. A task of your own, with a trained combiner, calls `score`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluate.base import Setting
from pretrain.evaluate.base.published import Query
from pretrain.kernels.ranks import Standing
from pretrain.signals import interruptible

READS = ("conditional",)
RECALL_AT = (1, 2, 3)
Combiner = Callable[[Tensor, Tensor], Tensor]
"""Features of references and of conditions, each [Q, D] unit norm -> queries [Q, D], of any norm."""
COMBINERS: dict[str, Combiner] = {
    "image": lambda image, text: image,
    "text": lambda image, text: text,
    "image_text": lambda image, text: image + text,
}


def measure(setting: Setting) -> dict[str, Any]:
    """recall@1, 2, 3 of each way to make a query, mean over files and of each file. Collective."""
    return score(setting, COMBINERS)


def score(setting: Setting, combiners: Mapping[str, Combiner]) -> dict[str, Any]:
    """The same for any ways to make a query. Equal scores count as a fair guess among them. Collective.

    Raises:
        UserError: there are no questions.
    """
    if not setting.records:
        raise UserError("there are no questions in data.eval")
    images = _images(setting)
    own: list[Query] = [setting.records[n] for n in setting.share(len(setting.records))]
    found = torch.zeros(len(own), len(combiners), len(RECALL_AT), dtype=torch.float64)
    with setting.world.together("comparing with galleries"), interruptible(), torch.inference_mode():
        texts = setting.texts([query.condition for query in own]).cpu()
        references = images[[query.reference for query in own]]
        for n, combine in enumerate(combiners.values()):
            queries = F.normalize(combine(references, texts), dim=-1)
            for row, (query, asked) in enumerate(zip(queries, own, strict=True)):
                found[row, n] = recalls(query, images[list(asked.gallery)])
    return _metrics(setting, setting.world.gather_rows(found), list(combiners))


def recalls(query: Tensor, gallery: Tensor) -> Tensor:
    """[3] fp64: chance that the first picture is among the first 1, 2, 3.

    Args:
        query: [D].
        gallery: [G, D], the target first.
    """
    scores = (gallery.double() @ query.double()).float()
    others = scores[1:]
    standing = Standing((others > scores[0]).sum()[None], (others == scores[0]).sum()[None], torch.ones(1).long())
    return torch.cat([standing.recall(k) for k in RECALL_AT])


def _images(setting: Setting) -> Tensor:
    """[N, D] fp32 on the CPU: every picture once. Collective."""
    parts = [torch.empty(0, setting.width)]
    with setting.world.together("encoding galleries"), interruptible(), torch.inference_mode():
        parts += [setting.images(batch).cpu() for batch in setting.batches]
    return setting.world.gather_rows(torch.cat(parts))


def _metrics(setting: Setting, found: Tensor, names: list[str]) -> dict[str, Any]:
    rows: dict[str, list[int]] = defaultdict(list)
    for n, query in enumerate(setting.records):
        rows[query.name].append(n)
    means = {name: found[numbers].mean(0) for name, numbers in rows.items()}
    metrics: dict[str, Any] = {"samples": len(found), "left_out": setting.left_out}
    metrics |= _named(torch.stack(list(means.values())).mean(0), names)
    return metrics | {"per_file": {name: _named(mean, names) for name, mean in means.items()}}


def _named(values: Tensor, names: list[str]) -> dict[str, float]:
    return {f"{name}_recall@{k}": float(values[n, m]) for n, name in enumerate(names) for m, k in enumerate(RECALL_AT)}
