"""Shards by name: a path, 'file://PATH', 'pipe:COMMAND', or any URL that fsspec has a driver for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pretrain.config import Data
from pretrain.data.storage import pipe
from pretrain.data.storage.base import Blob, Missing, Stat, Storage
from pretrain.data.storage.cache import Cache
from pretrain.data.storage.local import Local
from pretrain.data.storage.remote import Remote

__all__ = ["Blob", "Missing", "Stat", "Storage", "is_local", "make"]

_GIB = 1 << 30


def make(data: Data) -> Storage:
    """What opens the shards of a run. Small, picklable, and free of connections: these belong to a process.

    Credentials and endpoints are not ours to know: drivers find them where they always do (AWS_* variables,
    ~/.aws, GOOGLE_APPLICATION_CREDENTIALS, ...), and any option of a driver can be set as fsspec reads it, from
    FSSPEC_<PROTOCOL>_<OPTION> (FSSPEC_S3_ENDPOINT_URL, FSSPEC_HTTP_HEADERS) or ~/.config/fsspec/*.json.
    """
    limit = round(data.cache_gb * _GIB)
    cache = None if data.cache_dir is None else Cache(os.path.abspath(os.path.expanduser(data.cache_dir)), limit)
    remote = Remote(data.retry_s)
    behind = remote if cache is None else CachedRemote(remote, cache)
    return Router(Local(), behind, pipe.make(data.allow_pipe, cache, limit))


def is_local(name: str) -> bool:
    """Whether a name is a path of this machine."""
    return name.startswith("file://") or not re.match(r"pipe:|\w[\w+.-]*://", name)


@dataclass(frozen=True)
class CachedRemote:
    """A remote storage whose shards are read from a folder on this machine."""

    remote: Remote
    cache: Cache

    def stat(self, name: str) -> Stat:
        return self.remote.stat(name)

    def open(self, name: str, stat: Stat | None = None) -> Blob:
        return self.cache.open(name, stat or self.remote.stat(name), self.remote)

    def names(self, pattern: str) -> list[str]:
        return self.remote.names(pattern)

    def write(self, name: str, content: bytes) -> None:
        self.remote.write(name, content)


@dataclass(frozen=True)
class Router:
    """Hands each name to the storage that knows its kind."""

    local: Storage
    remote: Storage
    pipe: Storage

    def stat(self, name: str) -> Stat:
        return self._of(name).stat(name)

    def open(self, name: str, stat: Stat | None = None) -> Blob:
        return self._of(name).open(name, stat)

    def names(self, pattern: str) -> list[str]:
        return self._of(pattern).names(pattern)

    def write(self, name: str, content: bytes) -> None:
        self._of(name).write(name, content)

    def _of(self, name: str) -> Storage:
        if name.startswith("pipe:"):
            return self.pipe
        return self.local if is_local(name) else self.remote
