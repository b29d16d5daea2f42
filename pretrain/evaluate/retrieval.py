"""Retrieval between images and captions, with several captions an image.

A caption that several images carry, letter for letter, is one text, and it is relevant for each of them; an image's
relevant texts are all of its captions. Recall@k is the share of queries with a relevant answer among the first k, which
for one caption an image is the usual formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from pretrain.errors import UserError
from pretrain.evaluate.base import Setting
from pretrain.kernels.ranks import Relevance, Standing, ranks
from pretrain.signals import interruptible

READS = ("shards", "captions")
RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Found:
    """Features, and which text belongs to which image: of this rank, or of all of them."""

    images: Tensor
    """[I, D] fp32, on the CPU."""
    texts: Tensor
    """[T, D] fp32, on the CPU; no text twice."""
    hashes: Tensor
    """[T, 2] int64: 128 bits of each text, by which ranks know equal ones."""
    pairs: Tensor
    """[P, 2] int64: image, text."""


def measure(setting: Setting) -> dict[str, Any]:
    """recall@1, 5, 10, mean and median rank, in both directions. Collective.

    Raises:
        UserError: there are no held-out samples, or none has a caption.
    """
    with setting.world.together("encoding held-out pairs"), interruptible(), torch.inference_mode():
        own = encode(setting)
    everything = gather(setting, own)
    if not len(everything.pairs):
        raise UserError("there are no held-out captions: check data.eval and data.text_keys")
    image, text = everything.pairs.to(setting.world.device).unbind(1)
    images, texts = everything.images.to(setting.world.device), everything.texts.to(setting.world.device)
    found: dict[str, Any] = {"images": len(images), "texts": len(texts), "pairs": len(everything.pairs)}
    found |= _summary("image_to_text", _standing(setting, images, texts, Relevance.of(image, text)))
    return found | _summary("text_to_image", _standing(setting, texts, images, Relevance.of(text, image)))


def encode(setting: Setting) -> Found:
    """Features of this rank's images and different captions. Images without a caption are left out."""
    images: list[Tensor] = [torch.empty(0, setting.width)]
    numbers: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    total = 0
    for batch in setting.batches:
        kept = [n for n, captions in enumerate(batch.captions) if captions]
        images.append(setting.images(batch)[kept].cpu())
        for row, n in enumerate(kept):
            pairs += [(total + row, numbers.setdefault(text, len(numbers))) for text in batch.captions[n]]
        total += len(kept)
    texts = list(numbers)
    return Found(
        torch.cat(images), setting.texts(texts).cpu(), _hashes(texts), torch.tensor(pairs).reshape(-1, 2).long()
    )


def gather(setting: Setting, own: Found) -> Found:
    """What all ranks found, equal texts made one. Collective."""
    world = setting.world
    images_before, texts_before = _before(world.share((len(own.images), len(own.texts))), world.rank)
    pairs = world.gather_rows(own.pairs + torch.tensor([images_before, texts_before]))
    images, texts, hashes = (world.gather_rows(part) for part in (own.images, own.texts, own.hashes))
    unique, number = torch.unique(hashes, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(hashes)).scatter_reduce(0, number, torch.arange(len(hashes)), "amin")
    pairs = torch.unique(torch.stack([pairs[:, 0], number[pairs[:, 1]]], 1), dim=0)
    return Found(images, texts[first], unique, pairs)


def _standing(setting: Setting, queries: Tensor, candidates: Tensor, relevance: Relevance) -> Standing:
    """Every query's standing; each rank ranks its part of the queries."""
    part = setting.share(len(queries))
    with setting.world.together("ranking held-out pairs"), interruptible():
        own = ranks(queries[part.start : part.stop], candidates, relevance.rows(part.start, part.stop))
    columns = torch.stack([own.greater, own.ties, own.equals], 1).cpu()
    return Standing(*setting.world.gather_rows(columns).unbind(1))


def _summary(direction: str, standing: Standing) -> dict[str, float]:
    rank = standing.rank()
    recall = {f"{direction}_recall@{k}": float(standing.recall(k).mean()) for k in RECALL_AT}
    return recall | {f"{direction}_mean_rank": float(rank.mean()), f"{direction}_median_rank": float(np.median(rank))}


def _hashes(texts: list[str]) -> Tensor:
    digests = b"".join(xxhash.xxh3_128(text.encode()).digest() for text in texts)
    return torch.from_numpy(np.frombuffer(digests, dtype=np.int64).reshape(-1, 2).copy())


def _before(sizes: list[tuple[int, int]], rank: int) -> tuple[int, int]:
    """Images and texts of the ranks before this one."""
    images, texts = zip(*sizes, strict=True)
    return [0, *accumulate(images)][rank], [0, *accumulate(texts)][rank]
