"""Where each sample lies in its shard: an offset index made when a shard is first met, and kept.

shards.py holds the facts and the stored form, indexing.py makes them, fingerprint.py sums them up; here is what
`pretrain index` does with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.patterns import expand
from pretrain.data.shards.facts import Shard, ShardIndex, index_path, load
from pretrain.data.shards.fingerprint import fingerprint
from pretrain.data.shards.indexing import build, known, open_shards
from pretrain.data.storage import Storage

__all__ = [
    "IndexReport", "Shard", "ShardIndex", "build", "expand", "fingerprint", "known", "load", "make_index",
    "open_shards",
]  # fmt: skip


@dataclass(frozen=True)
class IndexReport:
    """What `pretrain index` found."""

    shards: int
    samples: int
    bytes: int
    built: int
    """Indexes written by this call."""
    members: dict[str, int]
    """Samples that have a member of each extension."""
    fingerprint: str
    problems: tuple[str, ...]
    """One line each, with the shard's name; empty: all is well."""


def make_index(
    patterns: Sequence[str], /, *, check: bool = False, index_dir: str | None = None, data: Data | None = None
) -> IndexReport:
    """Build the index of every shard that has none, or none that fits.

    Args:
        patterns: paths, URLs, globs and brace patterns.
        check: write nothing; read every shard again and compare with the index it has.
        index_dir: folder of the indexes; default: beside the shards.
        data: how remote shards are reached and cached.

    Raises:
        UserError: a pattern names nothing, a shard is no tar, or an index cannot be written.
    """
    data = replace(data or Data(), index_dir=index_dir or (data.index_dir if data else None))
    store = storage.make(data)
    names = expand(patterns, "shards", store)
    before = [known(name, data, store) for name in names]
    found, members, problems = list[Shard](), Counter[str](), list[str]()
    opened = _again(names, data, store) if check else ((s, load(s)) for s in open_shards(names, data, store))
    for (shard, index), old in zip(opened, before, strict=True):
        found.append(shard)
        members.update({name: int((index.suffix == n).sum()) for n, name in enumerate(index.suffixes)})
        problems += _problems(shard, old) if check else _damage(shard)
    return IndexReport(
        shards=len(found),
        samples=sum(shard.samples for shard in found),
        bytes=sum(shard.size for shard in found),
        built=0 if check else before.count(None),
        members=dict(members),
        fingerprint=fingerprint(found),
        problems=tuple(problems),
    )


def _again(names: Iterable[str], data: Data, store: Storage) -> Iterator[tuple[Shard, ShardIndex]]:
    for name in names:
        stat = store.stat(name)
        yield build(name, index_path(name, stat, data), store, stat)


def _problems(shard: Shard, stored: Shard | None) -> Iterator[str]:
    if stored is None:
        yield f"{shard.path}: has no index, or one of another version of the shard"
    elif stored != shard:
        yield f"{shard.path}: differs from its index, though size and time are the same"
    yield from _damage(shard)
    if not shard.samples and not shard.damage:
        yield f"{shard.path}: holds no samples"


def _damage(shard: Shard) -> Iterator[str]:
    return (f"{shard.path}: {reason}" for reason in shard.damage)
