"""Shards behind a URL, read by ranges through fsspec; a broken or stalled transfer goes on from the byte reached."""

from __future__ import annotations

import base64
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pretrain.data.storage import drivers
from pretrain.data.storage.base import Stat, changed
from pretrain.data.storage.faults import Patience, persist
from pretrain.data.storage.ranges import NoRanges, fetch, fetch_whole, is_conditional
from pretrain.errors import UserError

_VERSIONS = ("ETag", "etag", "generation", "blob_id", "Last-Modified", "LastModified", "last_modified", "mtime",
             "modified", "updated", "created")  # fmt: skip
"""Where drivers say which version of an object they see, the most exact first."""
_LOOK_AGAIN_S = 60.0
"""Where a read cannot ask for a version, an open shard's is looked up this often."""


class Checksum(NamedTuple):
    """What a store says that the content of an object hashes to."""

    algorithm: str
    digest: str
    """Hexadecimal."""
    certain: bool = True
    """False: S3's etag, which is the md5 of most objects, but not of those that a key service encrypts."""


class Sink(Protocol):
    """Takes a shard's bytes in order."""

    reached: int
    """Bytes that it has."""

    def append(self, content: bytes) -> None: ...

    def restart(self) -> None: ...


@dataclass(frozen=True)
class Remote:
    """Any URL that fsspec has a driver for."""

    retry_s: float
    """Seconds for which a failing transfer is tried again while not a byte comes."""
    stall_s: float = 30.0
    """Seconds without a byte after which a transfer has failed."""
    chunk: int = 8 << 20
    """Bytes per request of a download."""
    parallel: int = 4
    """Requests of a download on their way at once."""

    def stat(self, name: str) -> Stat:
        """Raises: Missing: there is no such object. UserError: it is refused. OSError: as `Blob.read`."""
        found = self._info(name)
        if found.get("size") is None or found.get("type") == "directory":
            raise UserError(f"{name}: its size is unknown or it is a folder; name a plain object")
        version = next((str(found[field]) for field in _VERSIONS if found.get(field)), "")
        return Stat(int(found["size"]), version)

    def open(self, name: str, stat: Stat | None = None) -> RemoteBlob:
        """The shard; where each read asks for the version anyway, that is what finds out that it has changed."""
        if stat is None or not is_conditional(name, stat):
            now = self.stat(name)
            if stat not in (None, now):
                raise changed(name)
            stat = now
        return RemoteBlob(self, name, stat)

    def names(self, pattern: str) -> list[str]:
        """Raises: UserError: it is refused. OSError: as `Blob.read`."""
        protocol, _, tail = pattern.partition("://")

        def attempt() -> list[str]:
            system = self.system(pattern)
            return [system.unstrip_protocol(path) for path in system.glob(_path(system, pattern))]

        found = [name.partition("://")[2] for name in persist(pattern, self.retry_s, attempt)]
        if not tail.startswith("/"):  # as the pattern was written, not as the driver does
            found = [name.lstrip("/") for name in found]
        return sorted(f"{protocol}://{name}" for name in found if not name.endswith("/"))

    def write(self, name: str, content: bytes) -> None:
        """Stores that fsspec writes to show an object when it is whole."""
        if name.startswith(("http://", "https://")):
            raise UserError(f"{name}: cannot be written over http; name a local folder or a bucket")
        persist(name, self.retry_s, lambda: self.system(name).pipe_file(_path(self.system(name), name), content))

    def read(self, name: str, stat: Stat, offset: int, size: int) -> bytes:
        """As `Blob.read`, of a shard that is `stat`."""
        stop = min(offset + size, stat.size)
        content, patience, broke = bytearray(), Patience(name, self.retry_s), False
        while (reached := offset + len(content)) < stop:
            try:
                fetch(self.system(name), name, stat, reached, stop, content, self.stall_s)
                if len(content) < stop - offset:
                    raise ConnectionError(f"the transfer ended at byte {offset + len(content)} of {stop}")
            except Exception as error:  # judged there, and raised again unless it is a failure that may pass
                if offset + len(content) > reached:
                    patience.progress()
                patience.failed(error)
                broke = True
        if broke and not is_conditional(name, stat):
            self._same(name, stat)
        if len(content) > max(0, stop - offset):
            raise changed(name)
        return bytes(content)

    def download(self, name: str, stat: Stat, sink: Sink) -> None:
        """Append the bytes that `sink` lacks; whole and from the start where the server has no ranges.

        Raises:
            UserError: the shard is gone, refused, or has changed.
            OSError: as `Blob.read`.
        """
        try:
            for content in self._chunks(name, stat, sink.reached):
                sink.append(content)
        except NoRanges:
            self._whole(name, stat, sink)
        self._same(name, stat)

    def checksum(self, name: str) -> Checksum | None:
        """None where the store offers none."""
        return _checksum(name, self._info(name))

    def system(self, name: str) -> Any:
        return drivers.system(name, self.stall_s)

    def _info(self, name: str) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            system = self.system(name)
            options: dict[str, Any] = {"timeout": 2 * self.stall_s} if getattr(system, "async_impl", False) else {}
            if name.startswith("hf://"):
                options["refresh"] = True  # it would answer from a listing that it keeps for good
            found: dict[str, Any] = system.info(_path(system, name), **options)
            return found

        return persist(name, self.retry_s, attempt)

    def _same(self, name: str, stat: Stat) -> None:
        if self.stat(name) != stat:
            raise changed(name)

    def _chunks(self, name: str, stat: Stat, start: int) -> Iterator[bytes]:
        """The rest of a shard in order, a few requests ahead."""
        threads = self.parallel if getattr(self.system(name), "async_impl", False) else 1
        ahead = deque[Future[bytes]]()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for offset in range(start, stat.size, self.chunk):
                    ahead.append(pool.submit(self.read, name, stat, offset, self.chunk))
                    if len(ahead) >= threads:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for request in ahead:
                    request.cancel()

    def _whole(self, name: str, stat: Stat, sink: Sink) -> None:
        patience, best = Patience(name, self.retry_s), 0
        while True:
            sink.restart()
            try:
                fetch_whole(self.system(name), name, stat, sink, self.stall_s)
                if sink.reached < stat.size:
                    raise ConnectionError(f"the transfer ended at byte {sink.reached} of {stat.size}")
                return
            except Exception as error:  # judged there, and raised again unless it is a failure that may pass
                if sink.reached > best:
                    patience.progress()
                best = max(best, sink.reached)
                patience.failed(error)


class RemoteBlob:
    """A shard read by ranges."""

    def __init__(self, remote: Remote, name: str, stat: Stat) -> None:
        self.remote, self.name, self.stat = remote, name, stat
        self._looked = time.monotonic()

    def read(self, offset: int, size: int) -> bytes:
        if not is_conditional(self.name, self.stat) and time.monotonic() - self._looked > _LOOK_AGAIN_S:
            if self.remote.stat(self.name) != self.stat:
                raise changed(self.name)
            self._looked = time.monotonic()
        return self.remote.read(self.name, self.stat, offset, size)

    def close(self) -> None:
        """Connections belong to the process, not to a shard."""


def _path(system: Any, name: str) -> str:
    return str(system._strip_protocol(name))


def _checksum(name: str, info: dict[str, Any]) -> Checksum | None:
    """From what drivers call it: Hugging Face's lfs, Content-MD5 and Digest of HTTP, Google's, Azure's and S3's."""
    lfs, azure = info.get("lfs") or {}, (info.get("content_settings") or {}).get("content_md5")
    if lfs.get("sha256"):
        return Checksum("sha256", lfs["sha256"])
    encoded = info.get("Content-MD5") or info.get("md5Hash")
    if encoded:
        return Checksum("md5", base64.b64decode(encoded).hex())
    if azure:
        return Checksum("md5", bytes(azure).hex())
    rfc3230 = re.search(r"(?i)\b(sha-256|sha-512|md5)=([\w+/]+=*)", str(info.get("Digest", "")))
    if rfc3230:
        return Checksum(rfc3230[1].lower().replace("-", ""), base64.b64decode(rfc3230[2]).hex())
    etag = str(info.get("ETag", "")).strip('"')
    if name.startswith(("s3://", "s3a://")) and re.fullmatch("[0-9a-f]{32}", etag):
        return Checksum("md5", etag, certain=False)
    return None
