"""Some held-out pairs, and where a run's encoders put them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain import checkpoint, model
from pretrain.config import Data
from pretrain.data.evaluation import EvalBatch, eval_loader
from pretrain.data.held_out import entries
from pretrain.data.rows import Tokenize
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.world import World

BATCH = 32
ALONE = World(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class Pairs:
    """N held-out images, each with one of its captions."""

    pixels: list[NDArray[np.uint8]]
    """N of [H, W, 3]: what the image tower sees."""
    captions: list[str]
    """N."""
    others: list[frozenset[str]]
    """N: all captions of each image."""
    images: NDArray[np.float32]
    """[N, D], unit norm."""
    texts: NDArray[np.float32]
    """[N, D], unit norm."""
    source: str = ""
    """Whose features these are."""

    def __len__(self) -> int:
        return len(self.captions)


def of_run(run: Path, most: int, average: bool | None = None, data: tuple[str, ...] = ()) -> Pairs:
    """Pairs from a run's data.eval, in the features of its newest good checkpoint.

    Args:
        most: pairs.
        average: whether to take the averaged weights; None: where there are any.
        data: held-out shards in place of the run's own.

    Raises:
        UserError: there is no checkpoint or no held-out pair, or one of them cannot be read.
    """
    found = checkpoint.locate(run)
    average = checkpoint.has_average(found) if average is None else average
    encoder = model.restore(found, average, ALONE.device)
    encoder.precision = "fp32"
    held_out = checkpoint.read_run(found).data
    held_out = dataclasses.replace(held_out, eval=data or held_out.eval, workers=0)
    weights = "averaged weights" if average else "weights"
    return dataclasses.replace(
        encode(encoder, held_out, ALONE.device, most), source=f"{weights} of step {checkpoint.step_of(found):,}"
    )


def encode(encoder: DualEncoder, data: Data, device: torch.device, most: int) -> Pairs:
    """Pairs from the whole held-out set, equally far apart, in the features of an encoder; the same on every rank.

    Where the towers are spread over ranks, all of them must call it.

    Args:
        encoder: in evaluation mode, on the device.
        most: pairs.

    Raises:
        UserError: no sample is held out, none has a caption, or one cannot be read.
    """
    data = dataclasses.replace(data, eval=entries(data))
    if data.synthetic is None and not data.eval:
        raise UserError("data.eval is empty: name held-out shards with --data, or in the run's config")
    tokenize: Tokenize = tokenizer.build(encoder.architecture.name)
    alone = dataclasses.replace(ALONE, device=device)
    loader = eval_loader(data, alone, encoder.image_spec, tokenize, BATCH, most)
    with torch.inference_mode():
        parts = [part for batch in loader for part in _encoded(encoder, batch)]
    if not parts:
        raise UserError("the held-out samples have no captions: check data.eval and data.text_keys")
    pixels, captions, others, images, texts = zip(*parts, strict=True)
    return Pairs(list(pixels), list(captions), list(others), np.stack(images), np.stack(texts))


def _encoded(
    encoder: DualEncoder, batch: EvalBatch
) -> Iterator[tuple[NDArray[np.uint8], str, frozenset[str], NDArray[np.float32], NDArray[np.float32]]]:
    """A caption is chosen by its sample's number, so that samples with the same captions show different ones."""
    starts = np.cumsum([0, *map(len, batch.captions)])
    rows = [n for n, captions in enumerate(batch.captions) if captions]
    chosen = [batch.numbers[n] % len(batch.captions[n]) for n in rows]
    if not rows:
        return
    images = _array(encoder.encode_image(batch.images)[rows])
    texts = _array(encoder.encode_text(batch.texts[[int(starts[n]) + k for n, k in zip(rows, chosen, strict=True)]]))
    for at, (n, k) in enumerate(zip(rows, chosen, strict=True)):
        pixels = batch.images[n].permute(1, 2, 0).cpu().numpy()
        yield pixels, batch.captions[n][k], frozenset(batch.captions[n]), images[at], texts[at]


def _array(features: Tensor) -> NDArray[np.float32]:
    return features.float().cpu().numpy()
