"""The data of drilled runs: made up in memory, or shards on disk where the fault is one of files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

SAMPLES, SHARDS, SIDE = 32, 2, 32
"""Of each shard; of them; pixels of a side."""


def _synthetic(folder: Path) -> tuple[str, ...]:
    return ()


def _shards(folder: Path, scheme: str = "") -> tuple[str, ...]:
    paths = [folder / "shards" / f"{number:05d}.tar" for number in range(SHARDS)]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        _write_shard(path, number)
    return "--data.train", f"{scheme}{folder}/shards/{{00000..{SHARDS - 1:05d}}}.tar"


SOURCES: Mapping[str, Callable[[Path], tuple[str, ...]]] = {
    "synthetic": _synthetic,
    "shards": _shards,
    "remote": partial(_shards, scheme="local://"),  # the driver of a remote store that this machine has
}
"""By name: what makes the data below a folder, and returns the knobs that name it."""


def _write_shard(path: Path, number: int) -> None:
    """A WebDataset tar of one-coloured pictures, the same bytes each time."""
    from PIL import Image

    with tarfile.open(path, "w") as tar:
        for sample in range(SAMPLES):
            picture, key = io.BytesIO(), f"{number:02d}{sample:04d}"
            Image.new("RGB", (SIDE, SIDE), (sample * 7, number * 99, 255 - sample * 7)).save(picture, "png")
            for suffix, content in (("png", picture.getvalue()), ("txt", f"shade {sample} of {number}".encode())):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
