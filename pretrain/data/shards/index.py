"""Where each sample lies in its shard: an offset index made when a shard is first met, and kept.

facts.py holds the facts and the stored form, indexing.py makes them, fingerprint.py sums them up; here is what
`pretrain index` does with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.patterns import expand
from pretrain.data.shards.facts import Shard, ShardIndex, load
from pretrain.data.shards.fingerprint import fingerprint
from pretrain.data.shards.indexing import build, known, open_shards

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


def make_index(patterns: Sequence[str], /, *, index_dir: str | None = None, data: Data | None = None) -> IndexReport:
    """Build the index of every shard that has none, or none that fits.

    Args:
        patterns: paths, URLs, globs and brace patterns.
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
    for shard in open_shards(names, data, store):
        index = load(shard)
        found.append(shard)
        members.update({name: int((index.suffix == n).sum()) for n, name in enumerate(index.suffixes)})
        problems += (f"{shard.path}: {reason}" for reason in shard.damage)
    return IndexReport(
        shards=len(found),
        samples=sum(shard.samples for shard in found),
        bytes=sum(shard.size for shard in found),
        built=before.count(None),
        members=dict(members),
        fingerprint=fingerprint(found),
        problems=tuple(problems),
    )
