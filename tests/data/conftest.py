"""Small shards with real tars, real images, and known defects."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.data.order import mix

PHOTOS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "photos32"


def picture(number: int, size: tuple[int, int] = (12, 10), format: str = "PNG") -> bytes:
    height, width = size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def sample(number: int) -> dict[str, bytes]:
    texts = [f"caption {number} {word}" for word in ("first", "second", "third")]
    return {
        "png": picture(number),
        "txt": texts[0].encode(),
        "json": json.dumps({"captions": texts, "label": number % 7}).encode(),
    }


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[str]]:
    """make_shards([4, 3]) writes two tars of four and three samples; `broken` maps a sample number to its members."""

    def make(counts: list[int], broken: dict[int, dict[str, bytes]] | None = None, folder: str = "shards") -> list[str]:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        paths, number = [], 0
        for shard, count in enumerate(counts):
            part = {f"{n:06d}": (broken or {}).get(n) or sample(n) for n in range(number, number + count)}
            paths.append(write_tar(place / f"{shard:05d}.tar", part))
            number += count
        return paths

    return make


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    if not PHOTOS.is_dir():
        pytest.skip("../shared/data/photos32 is not here: 32 real photographs")
    return sorted(PHOTOS.glob("*.jpg"))


class Words:
    """A tokenizer without a vocabulary file: 8 ids of 3 digits of a hash of each word."""

    context_length = 8

    def __call__(self, texts: list[str]) -> Any:
        import torch

        rows = [[1 + mix(*word.encode()) % 999 for word in text.split()][:8] for text in texts]
        return torch.tensor([row + [0] * (8 - len(row)) for row in rows], dtype=torch.int64).reshape(len(texts), 8)


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def tar_writer() -> Callable[[Path, dict[str, dict[str, bytes]]], str]:
    return write_tar


@pytest.fixture
def picture_bytes() -> Callable[..., bytes]:
    return picture
