"""Shards on a disk of this machine, read by position, so that forks and threads may share an open one."""

from __future__ import annotations

import glob
import os
import threading
from dataclasses import dataclass
from typing import Self

from pretrain.data.storage.base import Missing, Stat, changed


@dataclass(frozen=True)
class Local:
    """Paths, and 'file://' in front of one."""

    def stat(self, name: str) -> Stat:
        try:
            return _stat(os.stat(_path(name)))
        except (FileNotFoundError, NotADirectoryError):
            raise Missing(f"{name}: there is no such file; check the path") from None

    def open(self, name: str, stat: Stat | None = None) -> LocalBlob:
        blob = LocalBlob(_path(name), name)
        if stat is not None and blob.stat != stat:
            blob.close()
            raise changed(name)
        return blob

    def names(self, pattern: str) -> list[str]:
        return sorted(path for path in glob.glob(_path(pattern), recursive=True) if os.path.isfile(path))

    def write(self, name: str, content: bytes) -> None:
        write_whole(_path(name), content)


class LocalBlob:
    """An open file."""

    def __init__(self, path: str, name: str) -> None:
        self.name = name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise Missing(f"{name}: there is no such file; check the path") from None
        self.stat = _stat(os.fstat(self._fd))

    def read(self, offset: int, size: int) -> bytes:
        parts = [os.pread(self._fd, size, offset)]
        while parts[-1] and (got := sum(map(len, parts))) < size:  # a read returns at most 2 GiB
            parts.append(os.pread(self._fd, size - got, offset + got))
        content = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(content) < min(size, self.stat.size - offset):
            raise changed(self.name)
        return content

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def write_whole(path: str, content: bytes) -> None:
    """Write a file under another name, then rename it: readers see the old content or all of the new one."""
    temporary = f"{path}.{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _path(name: str) -> str:
    return name.removeprefix("file://")


def _stat(found: os.stat_result) -> Stat:
    return Stat(found.st_size, str(found.st_mtime_ns))
