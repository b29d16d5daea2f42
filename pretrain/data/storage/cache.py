"""Whole remote shards in a folder on a local disk, shared by all processes of a machine and bounded in size.

A shard is downloaded by one process while the others wait for it; it is written to a partial file, which the next
process goes on with where the first one died, then checked, synced and renamed. The locks are the kernel's, which drops
them when a process ends in any way. The shards that were not opened for longest make room; whoever has one of them open
reads on, as its bytes go when it is closed.

    HASH-NAME            a whole shard; HASH is over its URL, size and version, so that another version is another file
    HASH-NAME.json       its size, time and xxh3, written before it appears
    HASH-NAME.SIZE.part  the beginning of a shard of SIZE bytes
    HASH-NAME.lock       held by the process that downloads it;   cache.lock: by one that makes room
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import xxhash

from pretrain.data.storage.base import Missing, Stat, changed
from pretrain.data.storage.faults import log
from pretrain.data.storage.local import LocalBlob, write_whole
from pretrain.data.storage.locks import lock
from pretrain.data.storage.remote import Checksum, Sink
from pretrain.data.storage.room import make_room
from pretrain.errors import UserError

_BLOCK = 1 << 22
_GIB = 1 << 30
_no_md5 = set[str]()
"""Buckets whose etags turned out not to be the md5 of their objects."""


class Source(Protocol):
    """Where whole shards come from."""

    def download(self, name: str, stat: Stat, sink: Sink) -> None: ...

    def checksum(self, name: str) -> Checksum | None: ...


@dataclass(frozen=True)
class Cache:
    """A folder of whole shards."""

    folder: str
    limit: int
    """Bytes that all shards in it may have together."""

    def open(self, name: str, stat: Stat, source: Source) -> CachedBlob:
        """The shard's bytes, downloaded where the folder lacks them.

        Raises:
            UserError: it has changed, its content is not what its store says, or the folder cannot take it.
            OSError: it cannot be downloaded.
        """
        path = self.path(name, stat)
        blob = opened(path, name, stat)
        if blob is None:
            with self.ready(name), lock(f"{path}.lock"):
                if not _is_whole(path, stat):
                    self._get(name, stat, path, source)
                blob = opened(path, name, stat)  # before the lock is gone: then it may have to make room again
        if blob is None:
            raise OSError(f"{path}: was removed while it was made; leave data.cache_dir alone")
        return blob

    def path(self, name: str, stat: Stat) -> str:
        digest = xxhash.xxh3_64_hexdigest(f"{name}\0{stat.size}\0{stat.version}".encode())
        base = re.sub(r"[^\w.-]", "_", name.rstrip("/").rpartition("/")[2])[-80:]
        return os.path.join(self.folder, f"{digest}-{base}")

    @contextlib.contextmanager
    def ready(self, name: str) -> Iterator[None]:
        """The folder is there, and what goes wrong in it is a line for the user."""
        try:
            os.makedirs(self.folder, exist_ok=True)
            yield
        except (Missing, ConnectionError, TimeoutError):
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise
            raise UserError(
                f"data.cache_dir: {self.folder} cannot take {name} ({error.strerror}); "
                "name a folder that can be written and has room, or lower data.cache_gb"
            ) from None

    def admit(self, name: str, size: int, path: str) -> str:
        """The partial file of a shard that is about to come, when there is room for it.

        Raises:
            UserError: no room could ever be made.
        """
        if size > self.limit:
            raise UserError(
                f"data.cache_gb: {self.limit / _GIB:g} GiB cannot hold {name} of {size / _GIB:.3g} GiB; "
                "raise it, or leave data.cache_dir out and read by ranges"
            )
        partial = f"{path}.{size}.part"
        while not make_room(self.folder, self.limit, partial, size):
            self.wait()
        return partial

    def wait(self) -> None:
        """All room is promised to downloads of other processes; each ends some time."""
        time.sleep(0.2)

    def _get(self, name: str, stat: Stat, path: str, source: Source) -> None:
        partial, refused = self.admit(name, stat.size, path), list[str]()
        while True:
            with Partial(partial, stat.size, name) as sink:
                try:
                    source.download(name, stat, sink)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        os.unlink(partial)  # a full disk is no place to keep half a shard
                    raise
                except UserError:
                    os.unlink(partial)
                    raise
                os.fsync(sink.file.fileno())
            if _is_right(name, partial, source.checksum(name), refused):
                publish(partial, path)
                return
            os.unlink(partial)


def _is_right(name: str, path: str, expected: Checksum | None, refused: list[str]) -> bool:
    """Whether a file's content is what its store says; where not, its digest is added to `refused`.

    Raises:
        UserError: it is not, for the third time.
    """
    bucket = "/".join(name.split("/")[:3])
    if expected is None or (not expected.certain and bucket in _no_md5):
        return True
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, expected.algorithm).hexdigest()
    if found == expected.digest:
        return True
    says = f"{name}: {expected.algorithm} is {found}, its store says {expected.digest}"
    if not expected.certain and found in refused:
        _no_md5.add(bucket)
        log.warning("%s; downloaded twice alike, so the etags of %s are no md5 and are not checked", says, bucket)
        return True
    refused.append(found)
    if len(refused) == 3:
        os.unlink(path)
        raise UserError(f"{says}, three times; put the shard there again")
    log.warning("%s; downloading it again", says)
    return False


class CachedBlob(LocalBlob):
    """A whole shard in the folder, under the remote one's name and version."""

    def __init__(self, path: str, name: str, stat: Stat) -> None:
        super().__init__(path, name)
        self.stat = stat


class Partial:
    """The beginning of a shard; what a process that died has left of it is kept."""

    def __init__(self, path: str, size: int, name: str) -> None:
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by the with statement around it
        found = os.fstat(self.file.fileno())
        self.size, self.name, self.reached = size, name, found.st_size
        if self.reached > size or (self.reached and found.st_mtime < _booted()):
            self.restart()

    def append(self, content: bytes) -> None:
        view = memoryview(content)
        self.reached += len(view)
        if self.reached > self.size:
            raise changed(self.name)
        while view:
            view = view[self.file.write(view) or 0 :]

    def restart(self) -> None:
        self.file.truncate(0)
        self.reached = 0

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def publish(partial: str, path: str) -> None:
    """Give a whole and synced partial file its name, with its record beside it."""
    _record(path, os.stat(partial), _digest(partial))
    os.replace(partial, path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _record(path: str, stat: os.stat_result, digest: str) -> None:
    facts = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "xxh3_128": digest}
    write_whole(f"{path}.json", json.dumps(facts).encode())


def opened(path: str, name: str, stat: Stat) -> CachedBlob | None:
    """A shard that is in the folder, now the last used; None where it is not."""
    if not _is_whole(path, stat):
        return None
    try:
        blob = CachedBlob(path, name, stat)
        with contextlib.suppress(PermissionError):  # another user's: the kernel's own time of access has to do
            os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))  # what makes room goes by it
        return blob
    except FileNotFoundError:  # it made room for another just now
        return None


def recorded(path: str) -> Stat | None:
    """Size and xxh3 of a shard in the folder; None unless it is as it was published.

    That is told by size and time, and by content where only the time differs.
    """
    try:
        with open(f"{path}.json", "rb") as file:
            facts = json.load(file)
        found, stat = os.stat(path), Stat(int(facts["size"]), str(facts["xxh3_128"]))
        if found.st_size != stat.size:
            return None
        if found.st_mtime_ns != facts["mtime_ns"]:
            if _digest(path) != stat.version:
                return None
            _record(path, found, stat.version)
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        KeyError,
        TypeError,
    ):  # not there, or a record that is no record
        return None
    return stat


def _is_whole(path: str, stat: Stat) -> bool:
    found = recorded(path)
    return found is not None and found.size == stat.size


def _digest(path: str) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _booted() -> float:
    """When this machine was started, seconds since 1970; a partial file from before may lack what was not synced."""
    with open("/proc/stat") as file:
        return next((float(line.split()[1]) for line in file if line.startswith("btime ")), 0.0)
