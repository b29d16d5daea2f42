"""Shard names: braces, globs, lists and files of them, as WebDataset and open_clip users write them."""

from __future__ import annotations

import glob
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pretrain.config import Data
from pretrain.data import storage as storages
from pretrain.data.storage import Storage, is_local
from pretrain.errors import UserError

_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LISTED = " (over http a glob needs a server that lists its folders; a brace pattern does not)"
_JOINED = re.compile(r"::")
_NEXT_PIPE = re.compile(r"::(?=pipe:|\w[\w+.-]*://)")
"""Where a list goes on after a pipe: a command may hold '::' of its own."""


@dataclass(frozen=True)
class Entry:
    """The shards that one pattern names: one data set of a mixture."""

    paths: list[str]
    weight: float | None = None
    """From a file of weights."""


def entries(patterns: Iterable[str], storage: Storage | None = None, field: str = "data.train") -> list[Entry]:
    """The data sets that patterns name, in their order; a glob's shards in the order of their names.

    Args:
        patterns: 'a/{00000..00012}.tar', 'a/{x,y}/*.tar', '~/b.tar', 's3://bucket/{0..9}.tar', 'pipe:cat a.tar'; 'a::b'
            is two entries, as open_clip writes them. '@list.txt' or 'list.txt': a file with a pattern a line, together
            one entry; paths in it are relative to the working directory. 'mix.json' or 'mix.yaml': a file of
            {pattern: weight}, each an entry. These files may be remote.
        storage: what opens remote names; default: as a run without settings would.
        field: the knob's name, for messages.

    Raises:
        UserError: a pattern names nothing, a named local shard is missing, or one is named twice. Whether a remote
            shard that is named in full exists, tells whoever opens it: ten thousand questions are not asked here.
    """
    reader = storages.make(Data()) if storage is None else storage
    found = [entry for pattern in patterns for part in _split(pattern) for entry in _entries(part, reader, field)]
    seen = set[str]()
    for path in (path for entry in found for path in entry.paths):
        if path in seen:
            raise UserError(f"{field}: {path} is named twice; name each shard once")
        seen.add(path)
    return found


def expand(patterns: Iterable[str], field: str = "data.train", storage: Storage | None = None) -> list[str]:
    """Names of all shards, as `entries` finds them."""
    return [path for entry in entries(patterns, storage, field) for path in entry.paths]


def braces(pattern: str) -> Iterator[str]:
    """'x{1..3}{a,b}' -> x1a, x1b, x2a, ...; the zeros in front of a range's ends are kept, '{a}' stays as it is."""
    for found in _BRACE.finditer(pattern):
        choices = _choices(found[1])
        if len(choices) > 1 or _RANGE.fullmatch(found[1]):
            break
    else:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    for choice, rest in itertools.product(choices, list(braces(after))):
        yield from braces(before + choice + rest) if "{" in before else (before + choice + rest,)


def _choices(inside: str) -> list[str]:
    ends = _RANGE.fullmatch(inside)
    if not ends:
        return inside.split(",")
    first, last = int(ends[1]), int(ends[2])
    width = len(ends[1]) if ends[1].startswith("0") or ends[2].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _split(pattern: str) -> list[str]:
    return (_NEXT_PIPE if pattern.startswith("pipe:") else _JOINED).split(pattern)


def _entries(pattern: str, storage: Storage, field: str) -> list[Entry]:
    if pattern.startswith("@") or pattern.endswith(".txt"):
        name = _plain(pattern.removeprefix("@"))
        lines = [line.strip() for line in _text(name, storage, field).splitlines()]
        wanted = [line for line in lines if line and not line.startswith("#")]
        if not wanted:
            raise UserError(f"{field}: {name} lists no shards; write a pattern a line")
        return [Entry([path for line in wanted for path in _matches(line, storage, field)])]
    if pattern.endswith((".json", ".yaml", ".yml")) and not pattern.startswith("pipe:"):
        weights = _weights(_plain(pattern), storage, field)
        return [Entry(_matches(name, storage, field), weight) for name, weight in weights.items()]
    return [Entry(_matches(pattern, storage, field))]


def _weights(name: str, storage: Storage, field: str) -> dict[str, float]:
    text = _text(name, storage, field)
    try:
        found: Any = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{field}: {name} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{field}: {name} must map patterns to weights, such as {{'cc12m/*.tar': 2.0}}")
    for pattern, weight in found.items():
        good = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight > 0
        if not isinstance(pattern, str) or not good:
            raise UserError(f"{field}: {name} gives {pattern!r} the weight {weight!r}; it must be a number above 0")
    return {pattern: float(weight) for pattern, weight in found.items()}


def _text(name: str, storage: Storage, field: str) -> str:
    try:
        blob = storage.open(name)
    except FileNotFoundError:
        raise UserError(f"{field}: {name} is no file of shards; check the path") from None
    try:
        return blob.read(0, blob.stat.size).decode()
    except UnicodeDecodeError:
        raise UserError(f"{field}: {name} is no UTF-8 text; a shard's name ends with .tar") from None
    finally:
        blob.close()


def _matches(pattern: str, storage: Storage, field: str) -> list[str]:
    if pattern.startswith("synthetic:"):
        raise UserError(f"{field}: {pattern} is no shard: it stands alone, and only in a run's data.train")
    pattern = _plain(pattern)
    names = list(braces(pattern))
    if pattern.startswith("pipe:"):
        return [found for name in names for found in storage.names(name)]
    if _has_magic(pattern):
        found = [path for name in names for path in storage.names(name) if not path.endswith((".index", ".tmp"))]
        if not found:
            raise UserError(f"{field}: {pattern!r} names no file; check the path{_LISTED if '://' in pattern else ''}")
        return found
    missing = [name for name in names if is_local(name) and not os.path.isfile(name)]
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{field}: {len(missing)} of {len(names)} shards named are no files ({few}); a glob takes what is there"
        )
    return names


def _plain(name: str) -> str:
    """A local name as a path."""
    return os.path.expanduser(name.removeprefix("file://")) if is_local(name) else name


def _has_magic(pattern: str) -> bool:
    if pattern.startswith(("http://", "https://")):  # a question mark begins the query
        return re.search(r"[*\[]", pattern) is not None
    return glob.has_magic(pattern)
