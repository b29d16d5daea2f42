"""Where each sample lies in its shard: an offset index made when a shard is first met, and kept beside it.

An index belongs to a shard's size and modification time, and is made again when these change. It is written to a
temporary name and renamed, so that ranks, runs and machines may build at once. The fingerprint of a data set is over
names, sizes, headers and the first bytes of every member, not over times: a copied data set is the same one, a changed
one is not.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from pretrain.data import tar
from pretrain.data.patterns import expand
from pretrain.errors import UserError

__all__ = ["IndexReport", "Shard", "ShardIndex", "expand", "fingerprint", "make_index", "open_shards"]

_FORMAT = "pretrain-index-1"
_THREADS = 8


@dataclass(frozen=True)
class Shard:
    """A shard and the head of its index; the index itself is read when a sample is."""

    path: str
    index_path: str
    size: int
    """Bytes of the shard."""
    mtime_ns: int
    samples: int
    members: int
    key_bytes: int
    suffixes: tuple[str, ...]
    """Member extensions that occur, in the order met."""
    digest: str
    """Of the shard's headers and the first bytes of its members."""
    check: str
    """Hash of the index's body."""

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(frozen=True)
class ShardIndex:
    """The members of each sample of one shard."""

    suffixes: tuple[str, ...]
    first: np.ndarray
    """[samples + 1] uint32: members first[i] to first[i + 1] belong to sample i."""
    suffix: np.ndarray
    """[members] uint16, into suffixes."""
    offset: np.ndarray
    """[members] uint64, bytes."""
    size: np.ndarray
    """[members] uint64, bytes."""
    keys: bytes
    """Sample keys, utf-8, each ended by a zero byte."""

    @cached_property
    def names(self) -> list[str]:
        """Sample keys in order."""
        return self.keys.decode().split("\0")[:-1]

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) of one sample."""
        part = range(int(self.first[sample]), int(self.first[sample + 1]))
        return {self.suffixes[self.suffix[m]]: (int(self.offset[m]), int(self.size[m])) for m in part}

    def body(self) -> bytes:
        return b"".join(
            (self.first.tobytes(), self.suffix.tobytes(), self.offset.tobytes(), self.size.tobytes(), self.keys)
        )

    @staticmethod
    def of(shard: Shard, body: bytes) -> ShardIndex:
        """Back from `body`."""
        parts, at = [], 0
        for kind, count in (
            ("<u4", shard.samples + 1),
            ("<u2", shard.members),
            ("<u8", shard.members),
            ("<u8", shard.members),
        ):
            parts.append(np.frombuffer(body, kind, count, at))
            at += parts[-1].nbytes
        return ShardIndex(shard.suffixes, parts[0], parts[1], parts[2], parts[3], body[at:])


def open_shards(paths: Iterable[str], index_dir: str | None = None, start: int = 0) -> list[Shard]:
    """The shards with their indexes on disk, made where they are missing or old.

    Args:
        start: index number to begin with, so that ranks starting together share the work.

    Raises:
        UserError: a shard is no good tar, or its index cannot be written.
        OSError: a shard cannot be read.
    """
    todo = list(enumerate(paths))
    turn = start % len(todo) if todo else 0
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: (item[0], _open(item[1], index_dir)), todo[turn:] + todo[:turn])
        return [shard for _, shard in sorted(found, key=lambda item: item[0])]


def fingerprint(shards: Sequence[Shard]) -> str:
    """Hash of a data set: names, sizes, sample counts and digests of its shards, in order."""
    digest = xxhash.xxh3_128()
    for shard in shards:
        digest.update(f"{shard.name}\0{shard.size}\0{shard.samples}\0{shard.digest}\n".encode())
    return digest.hexdigest()


def load(shard: Shard) -> ShardIndex:
    """The index of a shard.

    Raises:
        UserError: it is gone or damaged since the shard was opened.
    """
    try:
        with open(shard.index_path, "rb") as file:
            file.readline()
            body = file.read()
    except FileNotFoundError:
        body = b""
    if xxhash.xxh3_128_hexdigest(body) != shard.check:
        raise UserError(f"{shard.index_path}: changed while it was in use; leave the shards alone and start again")
    return ShardIndex.of(shard, body)


def build(path: str, index_path: str) -> tuple[Shard, ShardIndex]:
    """Read a shard's headers. Samples are in the order of their first member; members need not be neighbours."""
    stat = os.stat(path)
    found, digest = tar.members(path)
    samples: dict[str, dict[str, tar.Member]] = {}
    for member in found:
        key, suffix = _split(member.name)
        if not suffix:
            continue
        if suffix in samples.setdefault(key, {}):
            raise UserError(f"{path}: holds {member.name!r} twice; keys must be unique in a shard: pack it again")
        samples[key][suffix] = member
    flat = [(suffix, member) for members in samples.values() for suffix, member in members.items()]
    number = {suffix: n for n, suffix in enumerate(dict.fromkeys(suffix for suffix, _ in flat))}
    index = ShardIndex(
        suffixes=tuple(number),
        first=np.cumsum([0, *map(len, samples.values())]).astype("<u4"),
        suffix=np.array([number[suffix] for suffix, _ in flat], "<u2"),
        offset=np.array([member.offset for _, member in flat], "<u8"),
        size=np.array([member.size for _, member in flat], "<u8"),
        keys=b"".join(key.encode() + b"\0" for key in samples),
    )
    check = xxhash.xxh3_128_hexdigest(index.body())
    facts = (stat.st_size, stat.st_mtime_ns, len(samples), len(flat), len(index.keys), index.suffixes, digest, check)
    return Shard(path, index_path, *facts), index


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path component. ('', '') for what is no sample."""
    found = re.fullmatch(r"((?:.*/|)[^./][^./]*)\.([^/]+)", name, re.DOTALL)
    return (found[1].removeprefix("./"), found[2].lower()) if found else ("", "")


def _open(path: str, index_dir: str | None) -> Shard:
    index_path = _index_path(path, index_dir)
    known = _known(path, index_path)
    if known is not None:
        return known
    shard, index = build(path, index_path)
    _write(shard, index)
    return shard


def _index_path(path: str, index_dir: str | None) -> str:
    if index_dir is None:
        return f"{path}.index"
    place = xxhash.xxh3_64_hexdigest(os.path.abspath(path).encode())
    return os.path.join(index_dir, f"{os.path.basename(path)}-{place}.index")


def _known(path: str, index_path: str) -> Shard | None:
    """The shard as its index describes it; None where there is no index, or it is not of this very file."""
    stat = os.stat(path)
    try:
        with open(index_path, "rb") as file:
            head = json.loads(file.readline())
            whole = os.fstat(file.fileno()).st_size - file.tell()
        if head.pop("format") != _FORMAT:
            return None
        shard = Shard(path=path, index_path=index_path, **head | {"suffixes": tuple(head["suffixes"])})
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None  # another version's, or cut short: it is made again
    expected = 4 * (shard.samples + 1) + 18 * shard.members + shard.key_bytes
    fresh = (shard.size, shard.mtime_ns, expected) == (stat.st_size, stat.st_mtime_ns, whole)
    return shard if fresh else None


def _write(shard: Shard, index: ShardIndex) -> None:
    head = {"format": _FORMAT} | {k: v for k, v in asdict(shard).items() if k not in ("path", "index_path")}
    temporary = f"{shard.index_path}.{os.uname().nodename}-{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(shard.index_path) or ".", exist_ok=True)
        Path(temporary).write_bytes(json.dumps(head).encode() + b"\n" + index.body())
        os.replace(temporary, shard.index_path)
    except OSError as error:
        place = os.path.dirname(shard.index_path) or "."
        raise UserError(
            f"data.index_dir: cannot write an index in {place} ({error.strerror}); name a folder that is writable"
        ) from None


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


def make_index(patterns: Sequence[str], /, *, check: bool = False, index_dir: str | None = None) -> IndexReport:
    """Build the index of every shard that has none, or none that fits.

    Args:
        patterns: paths, globs and brace patterns.
        check: write nothing; read every shard again and compare with the index it has.
        index_dir: folder of the indexes; default: beside the shards.

    Raises:
        UserError: a pattern names nothing, a shard is no good tar, or an index cannot be written.
    """
    paths = expand(patterns, "shards")
    before = [_known(path, _index_path(path, index_dir)) for path in paths]
    shards, members, problems = list[Shard](), Counter[str](), list[str]()
    opened = _again(paths, index_dir) if check else ((shard, load(shard)) for shard in open_shards(paths, index_dir))
    for (shard, index), old in zip(opened, before, strict=True):
        shards.append(shard)
        members.update({name: int((index.suffix == n).sum()) for n, name in enumerate(index.suffixes)})
        problems += _problems(shard, old) if check else ()
    return IndexReport(
        shards=len(shards),
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.size for shard in shards),
        built=0 if check else before.count(None),
        members=dict(members),
        fingerprint=fingerprint(shards),
        problems=tuple(problems),
    )


def _again(paths: Iterable[str], index_dir: str | None) -> Iterator[tuple[Shard, ShardIndex]]:
    return (build(path, _index_path(path, index_dir)) for path in paths)


def _problems(shard: Shard, stored: Shard | None) -> Iterator[str]:
    if stored is None:
        yield f"{shard.path}: has no index, or one of another version of the shard"
    elif stored != shard:
        yield f"{shard.path}: differs from its index, though size and time are the same"
    if not shard.samples:
        yield f"{shard.path}: holds no samples"
