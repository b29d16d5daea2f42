"""Which data set a run trains on: one hash that a checkpoint holds, and the facts of each shard that explain it.

Both are over names, sizes, sample counts and digests of headers and first bytes, not over times or places: a copied
data set is the same one, a changed one is not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import xxhash

from pretrain.data.shards.facts import Shard
from pretrain.errors import UserError

_FORMAT = "pretrain-data-1"


class Fact(NamedTuple):
    """What a shard adds to the fingerprint."""

    name: str
    """Without its folder."""
    size: int
    """Bytes."""
    samples: int
    digest: str
    """Of its headers and the first bytes of its members, and of the table beside it; '' with data.sizes."""
    entry: int
    """Which entry of data.train names it."""


def fingerprint(shards: Iterable[Shard | Fact], mixed: Sequence[tuple[int, int]] = ()) -> str:
    """Hash of a data set: names, sizes, sample counts and digests of its shards, in order.

    Args:
        mixed: shards and share of each weighted entry, which change the order of samples.
    """
    digest = xxhash.xxh3_128()
    for shard in shards:
        digest.update(f"{shard.name}\0{shard.size}\0{shard.samples}\0{shard.digest}\n".encode())
    if mixed:
        digest.update(repr(list(mixed)).encode())
    return digest.hexdigest()


def dump(facts: Sequence[Fact]) -> str:
    """The text of a run's data.json; a line for each shard."""
    lines = ",\n".join(json.dumps(fact._asdict()) for fact in facts)
    return f'{{"format": "{_FORMAT}", "fingerprint": "{fingerprint(facts)}", "shards": [\n{lines}\n]}}\n'


def parse(text: str) -> list[Fact]:
    """Back from `dump`. UserError: it is no such text."""
    try:
        return [Fact(**fact) for fact in json.loads(text)["shards"]]
    except (ValueError, KeyError, TypeError):
        raise UserError("is no list of shards") from None


def differences(before: Sequence[Fact], now: Sequence[Fact]) -> list[str]:
    """What has happened to the shards of a data set, a line each; empty: nothing."""
    old, new = _numbered(before), _numbered(now)
    found = [_replaced(fact, new[key]) for key, fact in old.items() if key in new and fact[:4] != new[key][:4]]
    found += [f"shard {key[0]} is missing ({fact.samples} samples)" for key, fact in old.items() if key not in new]
    found += [f"shard {key[0]} is new ({fact.samples} samples)" for key, fact in new.items() if key not in old]
    if not found and [fact.name for fact in before] != [fact.name for fact in now]:
        first = next(n for n, (a, b) in enumerate(zip(before, now, strict=True)) if a.name != b.name)
        found.append(f"the order of the shards has changed, from {before[first].name} on, where {now[first].name} is")
    if not found and [fact.entry for fact in before] != [fact.entry for fact in now]:
        found.append("the shards are grouped into other entries")
    return found


def summary(lines: Sequence[str]) -> str:
    """Up to three differences, and how many more there are."""
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _numbered(facts: Sequence[Fact]) -> dict[tuple[str, int], Fact]:
    """Facts by name, and by how often that name came before: folders may hold shards of the same name."""
    seen, found = Counter[str](), dict[tuple[str, int], Fact]()
    for fact in facts:
        found[fact.name, seen[fact.name]] = fact
        seen[fact.name] += 1
    return found


def _replaced(old: Fact, new: Fact) -> str:
    told = [f"{what} {a} -> {b}" for what, a, b in (("size", old.size, new.size), ("samples", old.samples, new.samples))
            if a != b]  # fmt: skip
    what = ", ".join(told) or "other content of the same size"
    return f"shard {old.name} was replaced since the run began ({what})"
