"""What is known of a shard, and the file that keeps it: the offset index.

A stored index is one line of JSON (the facts) and binary columns (where each member lies). It belongs to the shard's
size and version, is written under a temporary name and renamed, and so may be made by several processes at once.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import xxhash

from pretrain.config import Data
from pretrain.data.storage import Stat, is_local
from pretrain.data.storage.base import changed
from pretrain.errors import UserError

_FORMAT = "pretrain-index-2"
_PLACE = ("path", "index_path")


@dataclass(frozen=True)
class Shard:
    """A shard and the head of its index; the index itself is read when a sample is."""

    path: str
    """Path or URL."""
    index_path: str
    size: int
    """Bytes of the shard."""
    version: str
    """As `Stat.version`."""
    samples: int
    members: int
    key_bytes: int
    suffixes: tuple[str, ...]
    """Member extensions that occur, in the order met."""
    digest: str
    """Of the shard's headers and the first bytes of its members; '' where it was not read yet (data.sizes)."""
    check: str
    """Hash of the index's body; '' likewise."""
    damage: tuple[str, ...] = ()
    """What is wrong with the shard, or was left out, one reason each."""
    damage_keys: tuple[str, ...] = ()
    """The sample that each of `damage` is about, or ''."""

    @property
    def name(self) -> str:
        return base_name(self.path)

    @property
    def stat(self) -> Stat:
        return Stat(self.size, self.version)


@dataclass(frozen=True)
class ShardIndex:
    """The members of each sample of one shard."""

    suffixes: tuple[str, ...]
    first: np.ndarray
    """[samples + 1] uint32: members first[i] to first[i + 1] belong to sample i."""
    suffix: np.ndarray
    """[members] uint32, into suffixes."""
    offset: np.ndarray
    """[members] uint64, bytes."""
    size: np.ndarray
    """[members] uint64, bytes."""
    key_end: np.ndarray
    """[samples + 1] uint32: bytes key_end[i] to key_end[i + 1] of `keys` are the key of sample i."""
    keys: np.ndarray
    """[key_bytes] uint8: sample keys, utf-8."""

    @cached_property
    def names(self) -> list[str]:
        """Sample keys in order; `name` is cheaper for one."""
        return [self.name(sample) for sample in range(len(self.first) - 1)]

    def name(self, sample: int) -> str:
        """Key of one sample."""
        return self.keys[int(self.key_end[sample]) : int(self.key_end[sample + 1])].tobytes().decode()

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) of one sample."""
        part = range(int(self.first[sample]), int(self.first[sample + 1]))
        return {self.suffixes[self.suffix[m]]: (int(self.offset[m]), int(self.size[m])) for m in part}

    def body(self) -> bytes:
        columns = (self.first, self.suffix, self.offset, self.size, self.key_end, self.keys)
        return b"".join(column.tobytes() for column in columns)

    @staticmethod
    def of(shard: Shard, body: bytes | memoryview) -> ShardIndex:
        """Back from `body`, without a copy."""
        parts, at = [], 0
        for kind, count in _columns(shard):
            parts.append(np.frombuffer(body, kind, count, at))
            at += parts[-1].nbytes
        return ShardIndex(shard.suffixes, *parts)


def base_name(path: str) -> str:
    """'s3://a/b.tar' -> 'b.tar'."""
    return path.rstrip("/").rpartition("/")[2]


def index_path(path: str, stat: Stat, data: Data) -> str:
    """Where the index of a shard is kept: beside a local one, else in a folder under a name of all that counts."""
    if is_local(path):
        path = path.removeprefix("file://")
        if data.index_dir is None:
            return f"{path}.index"
        folder, identity = data.index_dir, os.path.abspath(path)
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        below = os.path.join(data.cache_dir, "indexes") if data.cache_dir else os.path.join(cache, "pretrain/indexes")
        folder, identity = data.index_dir or below, f"{path}\0{stat.size}\0{stat.version}"
    readable = re.sub(r"[^\w.-]", "_", base_name(path))[-100:]
    return os.path.join(os.path.expanduser(folder), f"{readable}-{xxhash.xxh3_64_hexdigest(identity.encode())}.index")


def stored(path: str, place: str, stat: Stat) -> Shard | None:
    """The shard as the index at `place` describes it; None where there is none, or it is not of this very shard."""
    try:
        with open(place, "rb") as file:
            head = json.loads(file.readline())
            whole = os.fstat(file.fileno()).st_size - file.tell()
        if head.pop("format") != _FORMAT:
            return None
        lists = {name: tuple(head[name]) for name in ("suffixes", "damage", "damage_keys")}
        shard = Shard(path=path, index_path=place, **head | lists)
        expected = sum(np.dtype(kind).itemsize * count for kind, count in _columns(shard))
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None  # another version's, or cut short: it is made again
    return shard if (shard.stat, expected) == (stat, whole) else None


def load(shard: Shard, verify: bool = True) -> ShardIndex:
    """The index of a shard, mapped into memory: pages come when they are used, and processes share them.

    Args:
        verify: read it all once and compare its hash; False: only that it is the file that was verified before.

    Raises:
        UserError: it is gone, replaced or damaged since the shard was opened.
    """
    body = memoryview(b"")
    try:
        with open(shard.index_path, "rb") as file:
            head = file.readline()
            body = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[len(head) :]
        same = json.loads(head)["check"] == shard.check
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        same = False
    if not same or (verify and xxhash.xxh3_128_hexdigest(body) != shard.check):
        raise changed(shard.index_path)
    return ShardIndex.of(shard, body)


def store(shard: Shard, index: ShardIndex) -> None:
    """Write the index of a shard, so that nobody ever sees a part of it. UserError: it cannot be written."""
    head = {"format": _FORMAT} | {k: v for k, v in asdict(shard).items() if k not in _PLACE}
    temporary = f"{shard.index_path}.{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        os.makedirs(os.path.dirname(shard.index_path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + index.body())
        os.replace(temporary, shard.index_path)
    except OSError as error:
        place = os.path.dirname(shard.index_path) or "."
        raise UserError(
            f"data.index_dir: cannot write an index in {place} ({error.strerror}); name a folder that is writable"
        ) from None


def _columns(shard: Shard) -> tuple[tuple[str, int], ...]:
    """dtype and length of the columns of an index's body, in order."""
    samples, members = shard.samples + 1, shard.members
    return ("<u4", samples), ("<u4", members), *[("<u8", members)] * 2, ("<u4", samples), ("u1", shard.key_bytes)
