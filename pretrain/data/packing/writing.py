"""Samples -> tar files, byte for byte the same wherever and whenever they are written."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.errors import UserError

Members = list[tuple[str, bytes]]
"""(extension, content) of one sample, in the order in which they are written."""
_USTAR_NAME = 100
_BLOCK = 512


def members_of(image: bytes, extension: str, captions: list[str], meta: dict[str, Any]) -> Members:
    """img2dataset's layout: the image, its first caption as txt, everything else as json."""
    texts = [("txt", captions[0].encode("utf-8", "replace")), ("json", to_json(meta | {"captions": captions}))]
    return [(extension, image), *texts]


def to_json(meta: dict[str, Any]) -> bytes:
    return json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace")


class ShardWriter:
    """Writes one or more tars, the next one begun where `limit` bytes would be exceeded.

    Args:
        folder: where the tars are built.
        names: name of the n-th tar, n from 0.
        limit: bytes of a tar; None: no limit. A sample is never split, so that a larger one gets a tar to itself.
    """

    def __init__(self, folder: Path, names: str, limit: int | None = None) -> None:
        self._folder, self._names, self._limit = folder, names, limit
        self._tar: tarfile.TarFile | None = None
        self.shards: dict[str, int] = {}
        """Name -> samples, in order."""

    def add(self, key: str, members: Members) -> None:
        """Append a sample. No time, owner or mode of this machine goes in."""
        size = sum(_BLOCK + -(-len(content) // _BLOCK) * _BLOCK for _, content in members)
        if self._tar is None or (self._limit and self._tar.offset + size > self._limit and self.shards[self._name]):
            self._next()
        assert self._tar is not None
        for extension, content in members:
            _append(self._tar, f"{key}.{extension}", content)
        self.shards[self._name] += 1

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()

    def _next(self) -> None:
        self.close()
        self._name = self._names.format(part=len(self.shards))
        self._tar = tarfile.open(self._folder / self._name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.shards[self._name] = 0


def write_shards(folder: Path, samples: Iterable[Members], samples_per_shard: int) -> int:
    """Number the samples and write them as 00000.tar, 00001.tar, ...; returns how many shards.

    Key = shard number and place in it, as img2dataset has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard, writer = -1, None
    for number, members in enumerate(samples):
        shard, place = divmod(number, samples_per_shard)
        if place == 0:
            if writer is not None:
                writer.close()
            writer = ShardWriter(folder, f"{shard:05d}.tar")
        assert writer is not None
        writer.add(key(shard, place), members)
    if writer is not None:
        writer.close()
    return shard + 1


def key(shard: int, place: int) -> str:
    """Name of a sample that has none of its own."""
    return f"{shard:05d}{place:05d}"


def _append(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    # a name that ustar cannot hold takes GNU's record, which every reader of today knows
    tar.format = tarfile.GNU_FORMAT if len(name.encode()) > _USTAR_NAME else tarfile.USTAR_FORMAT
    try:
        tar.addfile(info, io.BytesIO(content))
    except ValueError as error:
        raise UserError(f"pack: member {name[:80]!r} cannot be written into a tar: {error}") from None
