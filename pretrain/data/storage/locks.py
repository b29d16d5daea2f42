"""A lock between the processes of a machine that the kernel lets go of when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

_held = set[int]()


@contextlib.contextmanager
def lock(path: str) -> Iterator[None]:
    """Hold the lock file at `path`, made where it is missing, waiting for whoever holds it; excludes threads, too."""
    while True:
        fd = _opened(path)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if _is_at(fd, path):
            break
        _release(fd)  # its last holder removed it while we waited
    try:
        yield
    finally:
        _release(fd)


@contextlib.contextmanager
def try_lock(path: str, *, shared: bool = False) -> Iterator[bool]:
    """The same without waiting: whether it was free, or held by none but sharers where `shared`."""
    fd = _opened(path)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        free = _is_at(fd, path)
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        _release(fd)


def _opened(path: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.add(fd)
    return fd


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _release(fd: int) -> None:
    if fd in _held:
        _held.discard(fd)
        os.close(fd)


def _after_fork() -> None:
    """A child's copy of a lock would keep it locked after the parent died."""
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)
