"""Making indexes: of one shard from its headers, and of many at the speed of the disk.

A shard on a disk is read in small pieces one after the other, a remote one in large ones. Many shards
are shared out among processes, because the walk is Python, and among the ranks that start together. Every index is
stored as soon as it is made, so that a start that was interrupted goes on where it was.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash

from pretrain.config import Data
from pretrain.data.shards import facts as shards
from pretrain.data.shards import tar
from pretrain.data.shards.facts import Shard, ShardIndex
from pretrain.data.shards.index_helpers import Helpers
from pretrain.data.storage import Blob, Stat, Storage, is_local
from pretrain.phases import phase

_THREADS, _REMOTE_THREADS = 8, 16
_LOCAL_READ, _REMOTE_READ = 1 << 18, 1 << 23
"""Bytes read at once. From a disk so many that the system reads ahead (single headers of 30 KB samples come at half the
disk's speed), and so few that large members are passed over; from a remote store, few requests."""
_HELPED = 1 << 30
"""Bytes of shards from which on the start of further processes pays: about a second's work of one."""
_MAX_NOTES = 20
_QUIET_S, _EVERY_S = 2.0, 5.0


def open_shards(names: Sequence[str], data: Data, storage: Storage, start: int = 0) -> list[Shard]:
    """The shards with their indexes on disk, made where they are missing or old.

    Args:
        start: index number to begin with, so that ranks starting together share the work.

    Raises:
        UserError: a shard is no tar or gone, or its index cannot be written.
        OSError: a shard cannot be read.
    """
    with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
        found = dict(zip(names, pool.map(lambda name: known(name, data, storage), names), strict=True))
    turn = start % len(names) if names else 0
    todo = [name for name in (*names[turn:], *names[:turn]) if found[name] is None]
    local = [name for name in todo if is_local(name)]
    progress = Progress(len(todo), speaks=start == 0)
    found |= _build_all(local, data, storage, progress)
    remote = [name for name in todo if not is_local(name)]
    found |= _each(remote, lambda name: open_shard(name, data, storage), _REMOTE_THREADS, progress)
    progress.finish()
    return [shard for name in names if (shard := found[name]) is not None]


def known(name: str, data: Data, storage: Storage) -> Shard | None:
    """The shard as its stored index describes it; None where that must be made."""
    stat = storage.stat(name)
    return shards.stored(name, shards.index_path(name, stat, data), stat)


def open_shard(name: str, data: Data, storage: Storage) -> Shard:
    """One shard, with its index made and stored where it must be. Raises: as `open_shards`."""
    stat = storage.stat(name)
    place = shards.index_path(name, stat, data)
    shard = shards.stored(name, place, stat)
    if shard is None:
        shard, index = build(name, place, storage, stat)
        shards.store(shard, index)
    return shard


def build(name: str, place: str, storage: Storage, stat: Stat | None = None) -> tuple[Shard, ShardIndex]:
    """Read a shard's headers. Samples are in the order of their first member; members need not be neighbours."""
    stat = stat or storage.stat(name)
    blob = storage.open(name, stat)
    try:
        window = _Window(blob, _LOCAL_READ if is_local(name) else _REMOTE_READ)
        contents = tar.contents(name, window.read, stat.size)
    finally:
        blob.close()
    samples, notes = _grouped(contents)
    index = _indexed(samples)
    check = xxhash.xxh3_128_hexdigest(index.body())
    facts = (stat.size, stat.version, len(samples), len(index.suffix), len(index.keys), index.suffixes)
    reasons, keys = tuple(note.reason for note in notes), tuple(note.member for note in notes)
    return Shard(name, place, *facts, contents.digest, check, reasons, keys), index


def _grouped(contents: tar.Contents) -> tuple[dict[str, dict[str, tar.Member]], list[tar.Note]]:
    """Members by sample key and extension, and notes by sample key; what was cut short takes its sample with it."""
    samples: dict[str, dict[str, tar.Member]] = {}
    notes = [tar.Note(split(note.member)[0], note.reason) for note in contents.notes]
    for member in contents.members:
        key, suffix = split(member.name)
        if not suffix:
            continue
        if suffix in samples.setdefault(key, {}):
            notes.append(tar.Note(key, f"holds {member.name!r} more than once; the first one counts"))
        else:
            samples[key][suffix] = member
    for note in notes[: len(contents.notes)]:
        samples.pop(note.member, None)
    if len(notes) > _MAX_NOTES:
        notes[_MAX_NOTES:] = [tar.Note("", f"and {len(notes) - _MAX_NOTES} more defects")]
    return samples, notes


def _indexed(samples: dict[str, dict[str, tar.Member]]) -> ShardIndex:
    flat = [(suffix, member) for members in samples.values() for suffix, member in members.items()]
    number = {suffix: n for n, suffix in enumerate(dict.fromkeys(suffix for suffix, _ in flat))}
    keys = [key.encode() for key in samples]
    return ShardIndex(
        suffixes=tuple(number),
        first=np.cumsum([0, *map(len, samples.values())]).astype("<u4"),
        suffix=np.array([number[suffix] for suffix, _ in flat], "<u4"),
        offset=np.array([member.offset for _, member in flat], "<u8"),
        size=np.array([member.size for _, member in flat], "<u8"),
        key_end=np.cumsum([0, *map(len, keys)]).astype("<u4"),
        keys=np.frombuffer(b"".join(keys), "u1"),
    )


def split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path component. ('', '') for what is no sample."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash or dot == len(name) - 1:
        return "", ""
    return name[:dot].removeprefix("./"), name[dot + 1 :].lower()


class _Window:
    """Reads small pieces by way of large ones that follow each other."""

    def __init__(self, blob: Blob, size: int) -> None:
        self._blob, self._size, self._start, self._held = blob, size, 0, b""

    def read(self, offset: int, size: int) -> bytes:
        at = offset - self._start
        if not 0 <= at <= at + size <= len(self._held):
            self._start, self._held, at = offset, self._blob.read(offset, max(size, self._size)), 0
        return self._held[at : at + size]


def _build_all(names: Sequence[str], data: Data, storage: Storage, progress: Progress) -> dict[str, Shard | None]:
    """Shards of this machine's disks, by processes where there is work for them, else by threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
    count = min(len(names), cores // ranks)
    if count < 2 or sum(storage.stat(name).size for name in names) < _HELPED:
        return _each(names, lambda name: open_shard(name, data, storage), _THREADS, progress)
    with Helpers(count, data.index_dir) as helpers:
        _each(names, helpers.index, count, progress)
    return {name: open_shard(name, data, storage) for name in names}


def _each(
    names: Sequence[str], make: Callable[[str], Shard | None], threads: int, progress: Progress
) -> dict[str, Shard | None]:
    """`make` of every name by several threads; the first failure ends it, without waiting for what has not begun."""

    def one(name: str) -> Shard | None:
        shard = make(name)
        progress.add()
        return shard

    pool = ThreadPoolExecutor(threads)
    try:
        return dict(zip(names, pool.map(one, names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """Says on stderr how far long work is: one changing line on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, speaks: bool) -> None:
        self._total, self._speaks, self._done = total, speaks, 0
        self._began = time.monotonic()
        self._due, self._said, self._lock = self._began + _QUIET_S, False, threading.Lock()

    def add(self) -> None:
        """One more is done."""
        with phase("start", f"{self._done + 1} of {self._total} shards indexed"), self._lock:
            self._done += 1
            now, live = time.monotonic(), sys.stderr.isatty()
            if self._speaks and now >= self._due:
                self._due, self._said = now + (0.2 if live else _EVERY_S), True
                self._say("\r" if live else "", "" if live else "\n")

    def finish(self) -> None:
        """All is done."""
        if self._said:
            self._say("\r" if sys.stderr.isatty() else "", "\n")

    def _say(self, before: str, after: str) -> None:
        passed = time.monotonic() - self._began
        left = passed / max(self._done, 1) * (self._total - self._done)
        text = f"indexing shards: {self._done} of {self._total} in {passed:.0f} s, {left:.0f} s left"
        sys.stderr.write(f"{before}{text}{after}")
        sys.stderr.flush()
