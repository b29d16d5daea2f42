"""Shards that are open: a bounded number, the ones used last, shared by the threads of a process."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pretrain.data.shards.facts import Shard, ShardIndex
from pretrain.data.shards.parquet import Table
from pretrain.data.storage import Blob


@dataclass(frozen=True, slots=True)
class Opened:
    """An open shard."""

    shard: Shard
    blob: Blob
    index: ShardIndex
    table: Table | None
    """What stands beside it, where it was asked for."""


@dataclass
class _Slot:
    """A shard's place: it is opened by the first that comes, others wait for that one shard only."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    opened: Opened | None = None
    readers: int = 0
    evicted: bool = False


class OpenShards:
    """
    Args:
        open_one: opens the shard of a number.
        most: shards open at once, apart from those that are being read; default: as the process's limit of open files
            allows, an open shard having up to two.
    """

    def __init__(self, open_one: Callable[[int], Opened], most: int | None = None) -> None:
        self._open_one, self._most = open_one, most or _most()
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, turn: int) -> Iterator[Opened]:
        """The shard of a number, which stays open inside the block whatever other threads open."""
        with self._lock:
            slot = self._slots.setdefault(turn, _Slot())
            slot.readers += 1
            self._slots.move_to_end(turn)
            self._evict()
        try:
            with slot.lock:
                if slot.opened is None:
                    slot.opened = self._open_one(turn)
            yield slot.opened
        finally:
            with self._lock:
                slot.readers -= 1
                self._close_unused(slot)

    def __len__(self) -> int:
        return len(self._slots)

    def _evict(self) -> None:
        while len(self._slots) > self._most:
            _, slot = self._slots.popitem(last=False)
            slot.evicted = True
            self._close_unused(slot)

    def _close_unused(self, slot: _Slot) -> None:
        if slot.evicted and not slot.readers and slot.opened is not None:
            slot.opened.blob.close()
            slot.opened = None


def _most() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(2048, soft // 4))
