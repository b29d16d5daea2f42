"""Files and locks of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.storage.base import Missing, Stat
from pretrain.data.storage.locks import lock, try_lock
from pretrain.errors import UserError


def test_reads_by_position(tmp_path: Path) -> None:
    path = tmp_path / "a b.tar"
    path.write_bytes(bytes(range(100)))
    store = storage.make(Data())
    for name in (str(path), f"file://{path}"):
        stat = store.stat(name)
        assert stat == Stat(100, str(path.stat().st_mtime_ns))
        blob = store.open(name, stat)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda at: blob.read(at, 3)[0], range(90))) == list(range(90))  # noqa: B023
        assert (blob.read(98, 10), blob.read(100, 1), blob.read(0, 0)) == (b"bc", b"", b"")
        blob.close()
        blob.close()


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"0123456789")
    store = storage.make(Data())
    blob = store.open(str(path))
    os.truncate(path, 4)
    with pytest.raises(UserError, match=f"{path}: changed while it was in use"):
        blob.read(2, 5)
    with pytest.raises(UserError, match=f"{path}: changed while it was in use"):
        store.open(str(path), blob.stat)


def test_what_is_not_there(tmp_path: Path) -> None:
    store = storage.make(Data())
    for ask in (store.stat, store.open):
        with pytest.raises(Missing, match=r"none\.tar: there is no such file") as error:
            ask(f"{tmp_path}/none.tar")
        assert isinstance(error.value, UserError)
        assert isinstance(error.value, FileNotFoundError)
    assert store.names(f"{tmp_path}/*.tar") == []


def test_writes_are_whole_or_not_there(tmp_path: Path) -> None:
    store = storage.make(Data())
    store.write(f"{tmp_path}/new/a.index", b"one")
    reader = store.open(f"{tmp_path}/new/a.index")
    store.write(f"{tmp_path}/new/a.index", b"three")
    assert reader.read(0, 9) == b"one", "the old content is another file"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.index"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        store.write(f"{tmp_path}/folder", b"x")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def _hold(path: str, queue: Any) -> None:
    ready, forked = os.pipe()
    with lock(path):
        grandchild = os.fork()
        signal.alarm(60)  # whatever becomes of the test, neither outlives it for long
        if not grandchild:
            os.write(forked, b"x")
            signal.pause()
        os.read(ready, 1)
        queue.put(grandchild)
        signal.pause()


def test_a_lock_ends_with_its_holder_even_when_a_child_of_it_lives_on(tmp_path: Path) -> None:
    path, context = str(tmp_path / "x.lock"), multiprocessing.get_context("fork")
    queue = context.Queue()
    holder = context.Process(target=_hold, args=(path, queue))
    holder.start()
    grandchild = queue.get(timeout=30)
    with try_lock(path) as held:
        pass
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    with try_lock(path) as free:
        pass
    os.kill(grandchild, signal.SIGKILL)  # lived until here
    assert (held, free) == (False, True)


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path) -> None:
    path, order = str(tmp_path / "x.lock"), list[str]()

    def second() -> None:
        with lock(path):
            order.append("second")
            assert os.path.exists(path), "the lock is on the file that others will find"

    with ThreadPoolExecutor(1) as pool, lock(path):
        waiting = pool.submit(second)
        time.sleep(0.05)
        order.append("first")
        os.unlink(path)
    waiting.result(10)
    assert order == ["first", "second"]
