"""Shards that a shell command writes: run whole once, through webdataset, and read by position like any other.

The output is kept in data.cache_dir, for all processes of the machine and for the next start, or else in a private
folder that goes with the process which started the run. Order and resume are as exact as with files; a resume is
slower, as it runs the command again for each shard whose output is no longer there, and refuses other bytes.
"""

from __future__ import annotations

import atexit
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.data.storage.base import Blob, Stat
from pretrain.data.storage.cache import Cache, Partial, opened, publish, recorded
from pretrain.data.storage.locks import lock, try_lock
from pretrain.data.storage.room import make_room
from pretrain.errors import UserError

_PIECE = 1 << 20


@dataclass(frozen=True)
class Pipe:
    """Shards named 'pipe:COMMAND'."""

    cache: Cache | None
    """Where outputs are kept; None: such shards are refused."""

    def stat(self, name: str) -> Stat:
        """Size and xxh3 of the output. Runs the command where it is not kept.

        Raises:
            UserError: pipes are not allowed, or the command failed.
            OSError: its output cannot be kept.
        """
        cache = self._allowed(name)
        return recorded(_place(cache, name)) or self._open(cache, name).stat

    def open(self, name: str, stat: Stat | None = None) -> Blob:
        blob = self._open(self._allowed(name), name)
        if stat is not None and blob.stat != stat:
            blob.close()
            raise UserError(f"{name}: the command wrote other bytes than before; a shard must always be the same")
        return blob

    def names(self, pattern: str) -> list[str]:
        self._allowed(pattern)
        return [pattern]

    def write(self, name: str, content: bytes) -> None:
        raise UserError(f"{name}: a pipe is only read; name a folder or a bucket")

    def _allowed(self, name: str) -> Cache:
        if self.cache is None:
            raise UserError(f"{name}: is a command that runs in a shell; if you trust it, say --data.allow-pipe true")
        return self.cache

    def _open(self, cache: Cache, name: str) -> Blob:
        path = _place(cache, name)
        with cache.ready(name), lock(f"{path}.lock"):
            stat = recorded(path)
            if stat is None:
                _spool(cache, name, path)
                stat = recorded(path)
            blob = stat and opened(path, name, stat)
        if not blob:
            raise OSError(f"{path}: was removed while it was made; leave data.cache_dir alone")
        return blob


def make(allowed: bool, cache: Cache | None, limit: int) -> Pipe:
    """Pipes that keep their outputs in `cache`, or in a private folder of at most `limit` bytes where there is none."""
    if not allowed:
        return Pipe(None)
    return Pipe(cache or Cache(_private_folder(), limit))


def _place(cache: Cache, name: str) -> str:
    return cache.path(name, Stat(-1, "pipe"))


def _spool(cache: Cache, name: str, path: str) -> None:
    partial = cache.admit(name, 0, path)  # how large it gets is known when it is there
    try:
        with Partial(partial, cache.limit, name) as sink:
            sink.restart()
            for piece in _output(name):
                if sink.reached + len(piece) > cache.limit:
                    cache.admit(name, sink.reached + len(piece), path)
                sink.append(piece)
            os.fsync(sink.file.fileno())
        while not make_room(cache.folder, cache.limit, partial, os.path.getsize(partial)):
            cache.wait()
        publish(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _output(name: str) -> Iterator[bytes]:
    """What a command writes. Raises: UserError: it failed, or webdataset refuses to run it."""
    from webdataset.gopen import gopen

    try:
        pipe = gopen(name, "rb", _PIECE)
    except ValueError as error:
        raise UserError(f"{name}: webdataset refuses it ({error}); unset WDS_SECURE") from None
    try:
        while piece := pipe.stream.read(_PIECE):
            yield piece
        code = pipe.proc.wait()
    finally:
        pipe.stream.close()
        if pipe.proc.poll() is None:
            pipe.proc.terminate()
            pipe.proc.wait()
        pipe.status = pipe.proc.returncode
    if code:
        raise UserError(f"{name}: the command failed with exit status {code}; run it by hand to see why")


def _private_folder() -> str:
    """A new folder of this process, and the end of those whose processes died before they could remove theirs."""
    base = os.path.join(tempfile.gettempdir(), f"pretrain-pipe-{os.getuid()}")
    with lock(f"{base}.lock"):
        for old in glob.glob(f"{base}-*/owner"):
            with try_lock(old) as free:
                if free:
                    shutil.rmtree(os.path.dirname(old), ignore_errors=True)
        folder = tempfile.mkdtemp(prefix=f"{os.path.basename(base)}-")
        owner = os.open(os.path.join(folder, "owner"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(owner, fcntl.LOCK_SH)  # kept open, by this process and by workers that it forks
    atexit.register(_remove_of, os.getpid(), folder)
    return folder


def _remove_of(process: int, folder: str) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
