"""Shards to measure loaders with: real photographs at a size and JPEG quality of their own, with captions."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.report import ROOT
from pretrain.errors import UserError

PHOTOS = ROOT.parent / "shared" / "data" / "photos32"
QUALITY = 90
SHARDS = 4


def photos() -> Iterator[Image.Image]:
    """32 photographs where they lie beside the checkout, else the two that scikit-learn brings along."""
    paths = sorted(PHOTOS.glob("*.jpg"))
    if paths:
        yield from (Image.open(path).convert("RGB") for path in paths)
        return
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError("bench data: there are no photographs: pip install 'pretrain[digits]'") from None
    yield from map(Image.fromarray, load_sample_images().images)


def encoded(size: tuple[int, int], most: int) -> list[bytes]:
    """Photographs as JPEGs of (width, height)."""
    return [jpeg(photo.resize(size, Image.Resampling.BICUBIC)) for photo in islice(photos(), most)]


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write(folder: Path, size: tuple[int, int], samples: int, most: int) -> str:
    """`samples` of a jpg and a txt member, of `most` photographs, over SHARDS tars.

    Returns:
        Their brace pattern, as open_clip takes it.
    """
    images, words = encoded(size, most), np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, samples, SHARDS):
                add(tar, f"{number:08d}.jpg", images[number % len(images)])
                add(tar, f"{number:08d}.txt", caption(words).encode())
    return str(folder / f"{{00000..{SHARDS - 1:05d}}}.tar")


def caption(words: np.random.Generator) -> str:
    """Ten words of one or two of the pieces of a BPE."""
    return "a photo of " + " ".join(f"{'abcdefghijklmnop'[n % 16]}{n}" for n in words.integers(0, 400, 7))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
