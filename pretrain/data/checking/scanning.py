"""One shard read through: which members, captions and images its samples hold. Nothing is trusted, nothing is kept."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xxhash
from PIL import Image

from pretrain.config import Data
from pretrain.data.images.decode import FORMATS, BadSample, decode
from pretrain.data.packing.repack import MAX_MEMBER, ShardReader
from pretrain.data.processes import Tick
from pretrain.data.shards.facts import Shard, ShardIndex, load
from pretrain.data.shards.indexing import build
from pretrain.data.storage import is_local, make
from pretrain.data.texts.captions import MAX_TEXT_BYTES, parse_meta, texts_of

_HEADER = 1 << 16
_LOCAL_WINDOW, _REMOTE_WINDOW = 1 << 18, 1 << 23
_THUMBNAIL, _THUMBNAIL_QUALITY = 160, 75
_SHOWN = 300
"""Characters of a caption that a page shows."""
_TICK = 512


class Task(NamedTuple):
    """What to look at in a shard."""

    turn: int
    shard: Shard
    indexed: bool
    """Whether the stored index is this shard's."""
    decoded: frozenset[int]
    """Samples whose images are decoded."""
    shown: frozenset[int]
    """Samples that a page shows."""


class Picture(NamedTuple):
    """A sample on a page."""

    key: str
    caption: str
    size: tuple[int, int]
    jpeg: bytes
    """At most 160 pixels a side."""


@dataclass
class Tally:
    """Counts over samples; `+=` adds those of another shard."""

    samples: int = 0
    suffixes: Counter[str] = field(default_factory=Counter)
    """'jpg+json+txt' -> samples that have these members."""
    split: int = 0
    """Samples whose members are not neighbours: webdataset reads such a one as two."""
    captions: int = 0
    uncaptioned: int = 0
    """Samples without any caption."""
    bad_texts: Counter[str] = field(default_factory=Counter)
    """Reason -> samples whose text or json cannot be read."""
    words: Counter[int] = field(default_factory=Counter)
    """Words -> captions."""
    characters: Counter[int] = field(default_factory=Counter)
    imageless: int = 0
    sized: int = 0
    """Images whose header was read."""
    formats: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    """Pixels -> images."""
    heights: Counter[int] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    """Hundredths of a megapixel -> images."""
    image_bytes: int = 0
    """Of the images whose header was read."""
    decoded: int = 0
    undecodable: list[tuple[str, str]] = field(default_factory=list)
    """(shard/key, reason) of those that were tried."""
    pictures: list[Picture] = field(default_factory=list)

    def __iadd__(self, other: Tally) -> Tally:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class Scanned(NamedTuple):
    turn: int
    tally: Tally
    keys: np.ndarray
    """[n] uint64 hashes of keys, those that `Thinning` keeps."""
    places: np.ndarray
    """[n] uint32: which samples these are."""
    texts: np.ndarray
    """[m] uint64 hashes of captions, likewise."""


@dataclass(frozen=True)
class Scan:
    """Reads one shard after another. Travels to worker processes.

    Args:
        thin: of hashes of keys and captions, one in so many is kept, the same ones everywhere, so that what repeats
            is found among them as often as among all.
        every: of images, the header of one in so many is read.
    """

    data: Data
    thin: int = 1
    every: int = 1

    def __call__(self, task: Task, tick: Tick) -> Scanned:
        store = make(self.data)
        shard = task.shard
        index = load(shard) if task.indexed else build(shard.path, shard.index_path, store)[1]
        reader = ShardReader(shard, store, index, _LOCAL_WINDOW if is_local(shard.path) else _REMOTE_WINDOW)
        tally, texts = Tally(split=split_samples(index)), list[int]()
        try:
            for sample in range(shard.samples):
                self._sample(reader, sample, task, tally, texts)
                if sample % _TICK == _TICK - 1:
                    tick(_TICK, 0)
        finally:
            reader.close()
        tick(shard.samples % _TICK, shard.size)
        keys = np.array([_hash(name) for name in index.names], np.uint64)
        kept = np.flatnonzero(keys % np.uint64(self.thin) == 0)
        captions = np.array(texts, np.uint64)
        return Scanned(task.turn, tally, keys[kept], kept.astype(np.uint32), captions)

    def _sample(self, reader: ShardReader, sample: int, task: Task, tally: Tally, hashes: list[int]) -> None:
        places = reader.places(sample)
        tally.samples += 1
        tally.suffixes["+".join(sorted(places))] += 1
        captions = self._captions(reader, places, tally)
        for text in captions:
            tally.captions += 1
            tally.words[len(text.split())] += 1
            tally.characters[len(text)] += 1
            value = _hash(text)
            hashes += [value] if value % self.thin == 0 else []
        tally.uncaptioned += not captions
        own = next((key for key in self.data.image_keys if key in places), None)
        if own is None:
            tally.imageless += 1
            return
        if sample % self.every == 0:
            _measure(reader, places[own], tally)
        if sample in task.decoded or sample in task.shown:
            name = f"{reader.shard.name}/{reader.index.name(sample)}"
            _decode(reader, places[own], name, captions, sample in task.shown, tally)

    def _captions(self, reader: ShardReader, places: dict[str, tuple[int, int]], tally: Tally) -> list[str]:
        try:
            wanted = [key for key in dict.fromkeys((*self.data.text_keys, "json")) if key in places]
            members = {key: reader.read(places[key], MAX_TEXT_BYTES) for key in wanted}
            found = texts_of(members, parse_meta(members.get("json")), self.data.text_keys)
        except BadSample as bad:
            tally.bad_texts[str(bad)] += 1
            return []
        return list(dict.fromkeys(text for texts in found.values() for text in texts))


def split_samples(index: ShardIndex) -> int:
    """Samples that other samples' members lie between."""
    first = index.first.astype(np.int64)
    if len(first) < 2 or not len(index.offset):
        return 0
    owner = np.repeat(np.arange(len(first) - 1), np.diff(first))[np.argsort(index.offset, kind="stable")]
    runs = 1 + int((np.diff(owner) != 0).sum())
    starts = np.concatenate([owner[:1], owner[1:][np.diff(owner) != 0]])
    return int((np.bincount(starts) > 1).sum()) if runs > len(first) - 1 else 0


def _measure(reader: ShardReader, place: tuple[int, int], tally: Tally) -> None:
    """Format and size by the header alone, of the first bytes where these suffice."""
    offset, size = place
    found: Any = None
    for length in dict.fromkeys((min(size, _HEADER), size)):
        if length > MAX_MEMBER:  # no image: what is that large is never read
            break
        content = reader.read((offset, length))  # a shard that cannot be read is no property of its images
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = Image.open(io.BytesIO(content), formats=FORMATS)
            break
        except Exception:  # Pillow raises a dozen types for bytes that are no image, which counts them as unknown
            continue
    tally.sized += 1
    tally.image_bytes += size
    tally.formats[found.format if found else "unknown"] += 1
    if found:
        width, height = found.size
        tally.widths[width] += 1
        tally.heights[height] += 1
        tally.pixels[round(width * height / 1e4)] += 1


def _decode(
    reader: ShardReader, place: tuple[int, int], name: str, captions: list[str], shown: bool, tally: Tally
) -> None:
    tally.decoded += 1
    try:
        image = decode(reader.read(place))
    except BadSample as bad:
        tally.undecodable.append((name, str(bad)))
        return
    if shown:
        size = image.size
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_THUMBNAIL_QUALITY)
        tally.pictures.append(Picture(name, captions[0][:_SHOWN] if captions else "", size, file.getvalue()))


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
