"""Samples by number: what a training run reads, wherever it comes from."""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.images.decode import BadSample
from pretrain.data.order import Sized, shares
from pretrain.data.patterns import Entry
from pretrain.data.shards import facts as shards
from pretrain.data.shards import indexing, parquet, sizes
from pretrain.data.shards.facts import Shard
from pretrain.data.shards.fingerprint import Fact, fingerprint
from pretrain.data.shards.opened import Opened, OpenShards
from pretrain.data.storage import Missing, Storage
from pretrain.data.storage.base import changed
from pretrain.data.texts import captions
from pretrain.data.texts.captions import MAX_TEXT_BYTES
from pretrain.errors import UserError
from pretrain.values import Skip

log = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 1 << 28
_GAP, _REMOTE_GAP = 1 << 14, 1 << 20
"""Bytes between two members of a sample that are read along rather than by another call or request."""
_THREADS = 16

Place = tuple[int, int]
"""Offset and size in bytes."""


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
    """The json member, over the scalars of the table beside the shard where that is read."""

    @property
    def captions(self) -> list[str]:
        """All captions, each once; may be empty."""
        return list(dict.fromkeys(text for texts in self.texts.values() for text in texts))


class Source(Sized, Protocol):
    """A data set of numbered samples. Copies of it live in worker processes; its threads may read at once."""

    fingerprint: str
    """Changes when the data does."""
    facts: list[Fact]
    """What the fingerprint is made of, by shard; none where no shards are."""
    damage: tuple[Skip, ...]
    """What is wrong with whole shards, known before any sample is read; index -1."""

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
    """WebDataset tars read by offset: any sample costs one read where its members are neighbours.

    Args:
        entries: shards, in the order that numbers their samples: those of each entry of data.train, or plain names.
        data: which members hold images and captions, and where indexes are kept.
        store: what opens shards; default: as `data` says.
        start: shard to begin indexing with, so that ranks starting together share the work.
        field: the knob that named the shards, for messages.
        meta_columns: columns of the parquet table beside each shard that go into `meta`, as far as they are there.

    Raises:
        UserError: a shard is no tar, data.sizes does not fit, or no shard holds a sample.
    """

    def __init__(
        self,
        entries: Sequence[Entry] | Sequence[str],
        data: Data,
        store: Storage | None = None,
        start: int = 0,
        field: str = "data.train",
        meta_columns: Sequence[str] = (),
    ) -> None:
        groups = [(entry.paths, entry.weight) for entry in entries if not isinstance(entry, str)]
        groups = groups or [([str(entry) for entry in entries], None)]
        names = [name for paths, _ in groups for name in paths]
        self._data, self._store = data, store or storage.make(data)
        self._columns, self._meta_columns = parquet.columns_of(data.text_keys), list(meta_columns)
        lazy = data.sizes is not None and field == "data.train"
        self.shards = (sizes.sized if lazy else indexing.open_shards)(names, data, self._store, start)
        self.counts = [shard.samples for shard in self.shards]
        self.entries = [len(paths) for paths, _ in groups]
        self.weights = _weights([weight for _, weight in groups], data.weights if field == "data.train" else (), field)
        self.damage = tuple(_notes(self.shards))
        self.facts = self._facts()
        mixed = list(zip(self.entries, shares(self.weights), strict=True)) if self.weights else []
        self.fingerprint = fingerprint(self.facts, mixed)
        self._first = list(itertools.accumulate(self.counts, initial=0))
        self._open, self._verified = OpenShards(self._open_one), set[int]()
        self._refuse_empty(field)

    def __len__(self) -> int:
        return self._first[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}  # files and locks stay here

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_open": OpenShards(self._open_one)}

    def key(self, number: int) -> str:
        turn, sample = self._place(number)
        with self._open.use(turn) as opened:
            return f"{opened.shard.name}/{opened.index.name(sample)}"

    def sample(self, number: int) -> RawSample:
        turn, sample = self._place(number)
        with self._open.use(turn) as opened:
            places, name = opened.index.members(sample), opened.index.name(sample)
            image = next((key for key in self._data.image_keys if key in places), None)
            if image is None:
                has = ", ".join(sorted(places)[:10])
                raise BadSample(f"the sample has no {', '.join(self._data.image_keys)} member, only {has}")
            texts = {key: places[key] for key in (*self._data.text_keys, "json") if key in places}
            members = self._read(opened, {key: places[key] for key in (image, *texts)}, image)
        meta = captions.parse_meta(members.get("json"))
        encoded = members.pop(image) if image not in texts else members[image]
        row, table = {}, {}
        if opened.table is not None:
            row, table = opened.table.texts(name, self._columns), opened.table.meta(name)
        found = captions.texts_of(members, meta, self._data.text_keys, row)
        return RawSample(f"{opened.shard.name}/{name}", encoded, found, table | meta)

    def _place(self, number: int) -> Place:
        turn = bisect.bisect_right(self._first, number) - 1
        return turn, number - self._first[turn]

    def _read(self, opened: Opened, places: dict[str, Place], image: str) -> dict[str, bytes]:
        """Contents of members, by as few reads as their places allow. BadSample: one is larger than any should be."""
        for key, (_, size) in places.items():
            limit = MAX_IMAGE_BYTES if key == image else MAX_TEXT_BYTES
            if size > limit:
                raise BadSample(f"the {key} member has {size} bytes, the limit is {limit}")
        gap = _GAP if storage.is_local(opened.shard.path) else _REMOTE_GAP
        found: dict[str, bytes] = {}
        for start, stop in spans(places.values(), gap):
            content = opened.blob.read(start, stop - start)
            if len(content) != stop - start:
                raise UserError(f"{opened.shard.path}: is cut short at byte {start + len(content)}; copy it again")
            for key, (offset, size) in places.items():
                if start <= offset and offset + size <= stop:
                    found[key] = content[offset - start : offset - start + size]
        return found

    def _open_one(self, turn: int) -> Opened:
        shard = self.shards[turn]
        try:
            if not shard.check:
                shard = self._indexed(shard)
            blob = self._store.open(shard.path, shard.stat)
        except Missing:
            raise UserError(f"{shard.path}: vanished while it was in use; put it back and start again") from None
        try:
            index = shards.load(shard, verify=turn not in self._verified)
            table = self._table(shard.path)
        except BaseException:
            blob.close()
            raise
        self._verified.add(turn)
        self.shards[turn] = shard
        return Opened(shard, blob, index, table)

    def _indexed(self, expected: Shard) -> Shard:
        """A shard of which only data.sizes spoke so far."""
        found = indexing.open_shard(expected.path, self._data, self._store)
        if found.stat != expected.stat:
            raise changed(found.path)
        if found.samples != expected.samples:
            raise sizes.mismatch(found, expected, self._data.sizes)
        for reason in found.damage[:1]:  # too late for `damage`
            log.warning("%s: %s (%d notes)", found.path, reason, len(found.damage))
        return found

    def _table(self, path: str) -> parquet.Table | None:
        if not self._columns and not self._meta_columns:
            return None
        return parquet.Table(path, self._store, self._columns, None if self._columns else self._meta_columns)

    def _facts(self) -> list[Fact]:
        turns = [turn for turn, count in enumerate(self.entries) for _ in range(count)]
        digests = [shard.digest for shard in self.shards]
        if self._columns or self._meta_columns:
            if self._columns:
                parquet.check_installed("data.text_keys")
            with ThreadPoolExecutor(_THREADS) as pool:
                ask = lambda shard: parquet.digest(shard.path, self._store, self._columns)  # noqa: E731
                tables = list(pool.map(ask, self.shards))
            if any(tables):
                parquet.check_installed("tables beside data.train")
            digests = [f"{own}{table}" for own, table in zip(digests, tables, strict=True)]
        return [
            Fact(shard.name, shard.size, shard.samples, digest, turn)
            for shard, digest, turn in zip(self.shards, digests, turns, strict=True)
        ]

    def _refuse_empty(self, field: str) -> None:
        """UserError: there is nothing to read, or nothing where a weight asks for samples."""
        ends = list(itertools.accumulate(self.entries, initial=0))
        for number, (start, stop) in enumerate(itertools.pairwise(ends)):
            if (self.weights or not len(self)) and not sum(self.counts[start:stop]):
                few = ", ".join(shard.path for shard in self.shards[start : min(start + 3, stop)]) or "no shard"
                why = f"; {self.damage[0].shard}: {self.damage[0].reason}" if self.damage else ""
                which = f"entry {number + 1} of {len(self.entries)}, " if len(self.entries) > 1 else ""
                raise UserError(f"{field}: {which}{few}, holds no samples{why}; name shards that do")


def spans(places: Iterable[Place], gap: int) -> list[Place]:
    """(start, stop) of the reads that cover all places; two are one where at most `gap` bytes lie between them."""
    found: list[Place] = []
    for offset, size in sorted(places):
        if found and offset - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(found[-1][1], offset + size))
        else:
            found.append((offset, offset + size))
    return found


def _weights(own: Sequence[float | None], data_weights: Sequence[float], field: str) -> list[float]:
    """A weight for each entry, or none at all."""
    if data_weights:
        if len(data_weights) != len(own):
            raise UserError(f"data.weights {data_weights}: {len(own)} entries of data.train need as many weights")
        return list(data_weights)
    found = [weight for weight in own if weight is not None]
    if found and len(found) != len(own):
        raise UserError(f"{field}: {len(found)} of {len(own)} entries have a weight; give one to each, or to none")
    return found


def _notes(found: Iterable[Shard]) -> Iterator[Skip]:
    for shard in found:
        for key, reason in zip(shard.damage_keys, shard.damage, strict=True):
            yield Skip(-1, shard.name, key, reason)
