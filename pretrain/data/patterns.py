"""Shard names: braces, globs and lists, as WebDataset users write them."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator

from pretrain.errors import UserError

_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(patterns: Iterable[str], field: str = "data.train") -> list[str]:
    """Paths of the shards, in the order of the patterns; a glob's in the order of their names.

    Args:
        patterns: 'a/{00000..00012}.tar', 'a/{x,y}/*.tar', '~/b.tar'.
        field: the knob's name, for messages.

    Raises:
        UserError: a pattern names nothing, a named shard is missing, or one is named twice.
    """
    paths = [path for pattern in patterns for path in _matches(os.path.expanduser(pattern), field)]
    seen = set[str]()
    for path in paths:
        if path in seen:
            raise UserError(f"{field}: {path} is named twice; name each shard once")
        seen.add(path)
    return paths


def braces(pattern: str) -> Iterator[str]:
    """'x{1..3}{a,b}' -> x1a, x1b, x2a, ...; the zeros in front of a range's ends are kept."""
    found = _BRACE.search(pattern)
    if not found:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    for choice, rest in itertools.product(_choices(found[1]), list(braces(after))):
        yield from braces(before + choice + rest) if "{" in before else (before + choice + rest,)


def _choices(inside: str) -> list[str]:
    ends = _RANGE.fullmatch(inside)
    if not ends:
        return inside.split(",")
    first, last = int(ends[1]), int(ends[2])
    width = len(ends[1]) if ends[1].startswith("0") or ends[2].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _matches(pattern: str, field: str) -> list[str]:
    if re.match(r"\w+://|pipe:", pattern):
        raise UserError(f"{field}: {pattern!r} is no local path; copy or mount the shards")
    names = list(braces(pattern))
    if glob.has_magic(pattern):
        found = [path for name in names for path in sorted(glob.glob(name, recursive=True)) if _may_be_shard(path)]
        if not found:
            raise UserError(f"{field}: {pattern!r} names no file; check the path")
        return found
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{field}: {len(missing)} of {len(names)} shards named are no files ({few}); a glob takes what is there"
        )
    return names


def _may_be_shard(path: str) -> bool:
    return os.path.isfile(path) and not path.endswith((".index", ".tmp"))
