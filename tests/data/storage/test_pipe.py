"""Commands as shards: only when allowed, exact, and named when they fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.storage import Storage
from pretrain.errors import UserError


@pytest.fixture
def shard(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return storage.make(Data(allow_pipe=True, cache_dir=str(tmp_path / "cache")))


def logged(shard: Path) -> tuple[str, Path]:
    """A command that writes the shard, and the file in which it leaves a line each time."""
    log = shard.parent / "log"
    return f"pipe:echo run >> {log}; cat {shard}", log


def test_refused_without_the_flag(shard: Path) -> None:
    store = storage.make(Data())
    name, log = logged(shard)
    for ask in (store.stat, store.open, store.names):
        with pytest.raises(UserError, match=r"runs in a shell.*--data\.allow-pipe true"):
            ask(name)
    assert not log.exists()


def test_read_by_position_and_run_once(store: Storage, shard: Path, content: bytes) -> None:
    name, log = logged(shard)
    stat = store.stat(name)
    blob = store.open(name, stat)
    assert (blob.stat, stat.size) == (stat, len(content))
    assert blob.read(99_000, 1000) == content[99_000:100_000]
    assert store.stat(name) == stat
    assert log.read_text() == "run\n"


def test_other_bytes_are_refused(store: Storage, shard: Path, content: bytes, tmp_path: Path) -> None:
    name, log = logged(shard)
    stat = store.stat(name)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    assert store.open(name, stat).read(0, 5) == content[:5]
    assert log.read_text() == "run\n" * 2, "a resume runs it again"
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    shard.write_bytes(content[::-1])
    with pytest.raises(UserError, match=f"{name}: the command wrote other bytes"):
        store.open(name, stat)


@pytest.mark.parametrize(("end", "code"), [("exit 3", "3"), ("exit 141", "141"), ("kill -9 $$", "-9")])
def test_a_failing_command_is_named(end: str, code: str, store: Storage, shard: Path, tmp_path: Path) -> None:
    name = f"pipe:head -c 100000 {shard}; {end}"
    with pytest.raises(UserError, match=f"exit status {code};") as error:
        store.stat(name)
    assert name in str(error.value)
    assert not list((tmp_path / "cache").glob("*.tar*.part"))
    assert not list((tmp_path / "cache").glob("*.json"))


def test_refused_where_webdataset_is_locked(store: Storage, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(UserError, match=r"webdataset refuses it .*unset WDS_SECURE"):
        store.stat(f"pipe:cat {shard}")


def test_output_over_the_bound(shard: Path, tmp_path: Path) -> None:
    store = storage.make(Data(allow_pipe=True, cache_dir=str(tmp_path / "cache"), cache_gb=1000 / 2**30))
    with pytest.raises(UserError, match=r"data\.cache_gb: .* cannot hold pipe:cat"):
        store.stat(f"pipe:cat {shard}")


def _leave(name: str, queue: Any) -> None:
    store = storage.make(Data(allow_pipe=True))
    signal.alarm(120)  # whatever becomes of the test, it does not outlive it for long
    queue.put((store.stat(name), store.pipe.cache.folder))  # type: ignore[attr-defined]
    signal.pause()


@pytest.mark.slow
def test_a_private_folder_goes_with_its_process(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_leave, args=(f"pipe:cat {shard}", queue))
    child.start()
    stat, folder = queue.get(timeout=60)
    mine = storage.make(Data(allow_pipe=True))
    assert os.path.isdir(folder), "its owner lives"
    assert mine.stat(f"pipe:cat {shard}") == stat
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert os.path.isdir(folder)
    storage.make(Data(allow_pipe=True))
    assert not os.path.exists(folder), "the next start removes what a killed one left"
