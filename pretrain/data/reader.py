"""Samples by number: what a training run reads, wherever it comes from."""

from __future__ import annotations

import bisect
import itertools
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from pretrain.config import Data
from pretrain.data import captions, index
from pretrain.data.captions import MAX_TEXT_BYTES
from pretrain.data.decode import BadSample
from pretrain.data.index import Shard, ShardIndex
from pretrain.errors import UserError

MAX_IMAGE_BYTES = 1 << 28
_OPEN_SHARDS = 64


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored."""

    key: str
    """`shard/key`."""
    image_bytes: bytes
    """An encoded image."""
    texts: dict[str, list[str]]
    """Entry of data.text_keys -> the captions found there; entries without one are absent."""
    meta: dict[str, Any]
    """The json member."""

    @property
    def captions(self) -> list[str]:
        """All captions, each once; may be empty."""
        return list(dict.fromkeys(text for texts in self.texts.values() for text in texts))


class Source(Protocol):
    """A data set of numbered samples. Copies of it live in worker processes."""

    fingerprint: str
    """Changes when the data does."""

    @property
    def counts(self) -> list[int]:
        """Samples of each shard, in order: what the sample order is made of."""
        ...

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """`shard/key` of a sample, without reading it."""
        ...

    def sample(self, number: int) -> RawSample:
        """Read a sample.

        Raises:
            BadSample: this one cannot be used.
            UserError, OSError: the shard cannot be read.
        """
        ...


class ShardSource:
    """WebDataset tars read by offset: any sample costs one read of each of its members.

    Args:
        paths: shards, in the order that numbers their samples.
        data: which members hold images and captions, and where indexes are kept.
        start: shard to begin indexing with, so that ranks starting together share the work.
        field: the knob that named the shards, for messages.

    Raises:
        UserError: a shard is no good tar, or none holds a sample.
    """

    def __init__(self, paths: Sequence[str], data: Data, start: int = 0, field: str = "data.train") -> None:
        self.shards = index.open_shards(paths, data.index_dir, start)
        self.counts = [shard.samples for shard in self.shards]
        self.fingerprint = index.fingerprint(self.shards)
        self._first = list(itertools.accumulate(self.counts, initial=0))
        self._image_keys, self._text_keys = data.image_keys, data.text_keys
        self._open: OrderedDict[int, tuple[BinaryIO, ShardIndex]] = OrderedDict()
        if not len(self):
            raise UserError(f"{field}: {', '.join(paths[:3]) or 'no shard'} holds no samples; name shards that do")

    def __len__(self) -> int:
        return self._first[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # open files do not travel to another process

    def key(self, number: int) -> str:
        turn, sample = self._place(number)
        return f"{self.shards[turn].name}/{self._opened(turn)[1].names[sample]}"

    def sample(self, number: int) -> RawSample:
        turn, sample = self._place(number)
        file, offsets = self._opened(turn)
        places = offsets.members(sample)
        image = next((key for key in self._image_keys if key in places), None)
        if image is None:
            raise BadSample(f"the sample has no {', '.join(self._image_keys)} member, only {', '.join(places)}")
        texts = [key for key in (*self._text_keys, "json") if key in places]
        members = {key: self._read(file, turn, places[key], MAX_TEXT_BYTES) for key in texts}
        meta = captions.parse_meta(members.get("json"))
        return RawSample(
            key=f"{self.shards[turn].name}/{offsets.names[sample]}",
            image_bytes=self._read(file, turn, places[image], MAX_IMAGE_BYTES),
            texts=captions.texts_of(members, meta, self._text_keys),
            meta=meta,
        )

    def _place(self, number: int) -> tuple[int, int]:
        turn = bisect.bisect_right(self._first, number) - 1
        return turn, number - self._first[turn]

    def _read(self, file: BinaryIO, turn: int, place: tuple[int, int], limit: int) -> bytes:
        offset, size = place
        if size > limit:
            raise BadSample(f"a member has {size} bytes, the limit is {limit}")
        data = os.pread(file.fileno(), size, offset)  # keeps no position, so that forked workers may share the file
        if len(data) != size:
            raise UserError(
                f"{self.shards[turn].path}: is cut short at byte {offset + len(data)}; copy the shard again"
            )
        return data

    def _opened(self, turn: int) -> tuple[BinaryIO, ShardIndex]:
        if turn not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
            self._open[turn] = _open(self.shards[turn])
        self._open.move_to_end(turn)
        return self._open[turn]


def _open(shard: Shard) -> tuple[BinaryIO, ShardIndex]:
    file = open(shard.path, "rb", buffering=0)  # noqa: SIM115 - stays open until it is the least recently used
    stat = os.fstat(file.fileno())
    if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
        file.close()
        raise UserError(f"{shard.path}: changed while it was in use; leave the shards alone and start again")
    return file, index.load(shard)
