"""Keeps a folder of shards within its bound: those that were opened longest ago go first."""

from __future__ import annotations

import contextlib
import os
import re
from typing import NamedTuple

from pretrain.data.storage.locks import lock, try_lock

_PARTIAL = re.compile(r"(.*)\.(\d+)\.part")
_SHARD = re.compile(r"[0-9a-f]{16}-.*")


class _Entry(NamedTuple):
    used_ns: int
    size: int
    """Bytes that it takes, or will take when it is whole."""
    path: str
    owner: str
    """The shard's path: the lock of whoever downloads it is beside that."""


def make_room(folder: str, limit: int, partial: str, size: int) -> bool:
    """Reserve `size` bytes for the shard of which `partial` is the beginning, removing others as it takes.

    Returns:
        Whether there is room; False: not until another process has finished or given up its download.
    """
    with lock(os.path.join(folder, "cache.lock")):
        others = [entry for entry in _entries(folder) if entry.path != partial]
        taken = sum(entry.size for entry in others) + size
        for entry in sorted(others):
            if taken <= limit:
                break
            if _remove(entry, of=partial):
                taken -= entry.size
        if taken > limit:
            return False
        open(partial, "ab").close()  # the reservation: its name tells the size
        return True


def _entries(folder: str) -> list[_Entry]:
    found = []
    for item in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # removed by a download that failed
            stat, partial = item.stat(), _PARTIAL.fullmatch(item.path)
            if partial:
                found.append(_Entry(stat.st_mtime_ns, int(partial[2]), item.path, partial[1]))
            elif _SHARD.fullmatch(item.name) and not item.name.endswith((".json", ".lock", ".tmp")):
                found.append(_Entry(stat.st_atime_ns, stat.st_size, item.path, item.path))
    return found


def _remove(entry: _Entry, of: str) -> bool:
    """Remove a shard, or a partial one that nobody is downloading. Readers that have it open read on."""
    owner = f"{entry.owner}.lock"
    if of.startswith(f"{entry.owner}."):  # an older partial file of the shard that we are downloading ourselves
        return _unlink(entry.path)
    with try_lock(owner) as free:
        return free and _unlink(entry.path, f"{entry.owner}.json", owner)


def _unlink(*paths: str) -> bool:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return True
