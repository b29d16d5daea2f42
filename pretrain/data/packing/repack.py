"""Samples of existing shards on their way into new ones: what need not change stays as it is, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pretrain.config import Data
from pretrain.data.images.decode import BadSample
from pretrain.data.packing.polish import Polish
from pretrain.data.packing.writing import Members, to_json
from pretrain.data.patterns import expand
from pretrain.data.shards import facts as stored
from pretrain.data.shards.facts import Shard, ShardIndex
from pretrain.data.shards.fingerprint import fingerprint
from pretrain.data.shards.indexing import open_shards
from pretrain.data.storage import Blob, Storage, make
from pretrain.data.texts.captions import parse_meta, texts_of
from pretrain.errors import UserError

MAX_MEMBER = 1 << 28
"""Bytes; a larger member is no image, text or json, and its sample is left out."""
_WINDOW = 1 << 23


class ShardReader:
    """All members of the samples of one shard, by large reads that follow each other, which suits remote shards."""

    def __init__(self, shard: Shard, storage: Storage, index: ShardIndex | None = None, window: int = _WINDOW) -> None:
        self.shard, self._window = shard, window
        self.index = stored.load(shard) if index is None else index
        self._blob: Blob = storage.open(shard.path, shard.stat)
        self._start, self._held = 0, b""

    def close(self) -> None:
        self._blob.close()

    def places(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size)."""
        return self.index.members(sample)

    def members(self, sample: int) -> dict[str, bytes]:
        """Extension -> content. BadSample: one is larger than MAX_MEMBER."""
        return {extension: self.read(place) for extension, place in self.places(sample).items()}

    def read(self, place: tuple[int, int], most: int = MAX_MEMBER) -> bytes:
        """The content at (offset, size). BadSample: it is larger than `most`."""
        offset, size = place
        if size > most:
            raise BadSample(f"a member has {size} bytes, the limit is {most}")
        at = offset - self._start
        if not 0 <= at <= at + size <= len(self._held):
            self._start, self._held, at = offset, self._blob.read(offset, max(size, self._window)), 0
        if at + size > len(self._held):
            raise UserError(f"{self.shard.path}: is cut short at byte {offset}; copy the shard again")
        return self._held[at : at + size]


class ShardInputs:
    """The samples of shards, in order, then what their indexes say is lost."""

    def __init__(
        self, patterns: Sequence[str], image_keys: tuple[str, ...], text_keys: tuple[str, ...], index_dir: str | None
    ) -> None:
        unknown = [key for key in text_keys if ":" in key and not key.startswith("json:")]
        if unknown:
            raise UserError(f"text_keys {unknown[0]}: packing reads captions of members and of 'json:FIELD' alone")
        data = Data(train=tuple(patterns), index_dir=index_dir)
        self._storage = make(data)
        self._image_keys, self._text_keys = image_keys, text_keys
        self._shards = open_shards(expand(patterns, "pack shards", self._storage), data, self._storage)
        self._open: ShardReader | None = None
        self.total = sum(shard.samples + len(shard.damage) for shard in self._shards)
        self.facts: dict[str, Any] = {
            "source": fingerprint(self._shards),
            "image_keys": list(image_keys),
            "text_keys": list(text_keys),
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def items(self) -> Iterator[tuple[int, int]]:
        """(shard, sample); (shard, -1 - n) is its n-th damage."""
        for turn, shard in enumerate(self._shards):
            yield from ((turn, sample) for sample in range(shard.samples))
            yield from ((turn, -1 - note) for note in range(len(shard.damage)))

    def name(self, item: tuple[int, int]) -> str:
        turn, sample = item
        shard = self._shards[turn]
        return f"{shard.path}/{shard.damage_keys[-1 - sample] if sample < 0 else self._reader(turn).index.name(sample)}"

    def read(self, item: tuple[int, int], polish: Polish) -> tuple[str, Members]:
        turn, sample = item
        if sample < 0:
            raise BadSample(self._shards[turn].damage[-1 - sample])
        reader = self._reader(turn)
        return reader.index.name(sample), self._packed(reader.members(sample), polish)

    def _reader(self, turn: int) -> ShardReader:
        if self._open is None or self._open.shard is not self._shards[turn]:
            if self._open is not None:
                self._open.close()
            try:
                self._open = ShardReader(self._shards[turn], self._storage)
            except PermissionError as error:  # of a shard: not of one sample, which would be skipped
                raise UserError(f"{self._shards[turn].path}: {error.strerror}; let this user read it") from None
        return self._open

    def _packed(self, members: dict[str, bytes], polish: Polish) -> Members:
        own = next((key for key in self._image_keys if key in members), None)
        if own is None:
            raise BadSample(f"the sample has no {', '.join(self._image_keys)} member, only {', '.join(members)}")
        meta = parse_meta(members.get("json"))
        changes = _cleaned(members, meta, texts_of(members, meta, self._text_keys), polish)
        before = members.pop(own)
        image, extension, size = polish.image(before, own)
        if image is not before:
            sides = dict(zip(("width", "height"), size, strict=True))  # as img2dataset notes them
            changes |= {key: value for key, value in sides.items() if key in meta}
            own = own if extension in members else extension
        if changes:
            members["json"] = to_json({k: v for k, v in (meta | changes).items() if v is not None or k not in changes})
        return [(own, image), *members.items()]


def _cleaned(
    members: dict[str, bytes], meta: dict[str, Any], texts: dict[str, list[str]], polish: Polish
) -> dict[str, Any]:
    """Cleans the text members in place; returns the fields of the json that change, None: goes away."""
    if not texts:
        raise BadSample("there is no caption")
    kept = {key: polish.texts(found) for key, found in texts.items()}
    if not any(kept.values()):
        raise BadSample("no caption is left after cleaning")
    changes = dict[str, Any]()
    for key in (key for key, found in texts.items() if kept[key] != found):
        field = key.removeprefix("json:")
        if field != key:
            changes[field] = (kept[key] if isinstance(meta[field], list) else kept[key][0]) if kept[key] else None
        elif kept[key]:
            members[key] = kept[key][0].encode("utf-8", "replace")
        else:
            del members[key]
    return changes
