"""Whole shards on a local disk: exact, shared, bounded, and in nobody's way after a crash."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.storage import CachedRemote
from pretrain.data.storage.base import Stat
from pretrain.data.storage.cache import Cache
from pretrain.data.storage.remote import Checksum, Remote, Sink
from pretrain.errors import UserError

CHUNK = 1 << 16


@pytest.fixture
def cached(remote: Remote, tmp_path: Path) -> CachedRemote:
    return CachedRemote(remote, Cache(str(tmp_path / "cache"), 1 << 30))


def whole(store: CachedRemote, url: str) -> bytes:
    blob = store.open(url)
    try:
        return blob.read(0, blob.stat.size + 1)
    finally:
        blob.close()


def shards(store: CachedRemote) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in Path(store.cache.folder).glob("*.tar"))


def leftovers(store: CachedRemote) -> list[str]:
    return [path.name for path in Path(store.cache.folder).iterdir() if path.name.endswith((".part", ".tmp"))]


def test_a_shard_is_downloaded_once(cached: CachedRemote, web: Any, content: bytes) -> None:
    url = web.url("/a/x.tar")
    assert whole(cached, url) == content
    starts = [first for first, _ in (request.range for request in web.gets())]
    assert starts == list(range(0, len(content), CHUNK))
    web.log.clear()
    stat = cached.stat(url)
    blob = cached.open(url, stat)
    assert (blob.stat, blob.read(7, 7), blob.read(len(content), 1)) == (stat, content[7:14], b"")
    assert not web.gets()
    assert (shards(cached), leftovers(cached)) == (["x.tar"], [])


@pytest.mark.parametrize("kind", ["drop", "stall", "truncate", "refuse"])
def test_broken_downloads_go_on(kind: str, cached: CachedRemote, web: Any, make_proxy: Any, content: bytes) -> None:
    proxy = make_proxy(web.port)
    proxy.faults.extend([("", 0), (kind, 100_000), (kind, 30_000), (kind, 100_000)])
    url = web.url("/a/x.tar", proxy.port)
    stat = cached.stat(url)
    proxy.passed[:] = [0] * len(proxy.passed)
    assert cached.open(url, stat).read(0, len(content)) == content
    starts = [request.range[0] for request in web.gets()]
    assert starts == sorted(starts)
    assert sum(proxy.passed) < len(content) + 10_000, "no byte that had arrived was sent again"


def test_a_server_without_ranges_sends_it_whole(
    cached: CachedRemote, make_web: Any, make_proxy: Any, content: bytes
) -> None:
    web = make_web(ranges=False)
    web.files["/x.tar"] = content
    proxy = make_proxy(web.port)
    proxy.faults.extend([("", 0), ("", 0), ("truncate", 100_000), ("drop", 150_000)])
    assert whole(cached, web.url("/x.tar", proxy.port)) == content


def _download(store: CachedRemote, url: str, stat: Stat, queue: Any = None) -> None:
    blob = store.open(url, stat)
    if queue is not None:
        queue.put(hashlib.sha1(blob.read(0, blob.stat.size)).hexdigest())


def test_a_killed_download_is_taken_up_by_the_next_process(
    cached: CachedRemote, web: Any, make_proxy: Any, content: bytes
) -> None:
    url = web.url("/a/x.tar")
    stat = cached.stat(url)
    release: list[Any] = []
    web.before = lambda request: time.sleep(60) if len(web.gets()) == 4 and not release else None
    slow = CachedRemote(replace(cached.remote, stall_s=60.0), cached.cache)
    child = multiprocessing.get_context("fork").Process(target=_download, args=(slow, url, stat), daemon=True)
    child.start()
    partial = Path(f"{cached.cache.path(url, stat)}.{stat.size}.part")
    while not partial.exists() or partial.stat().st_size < 3 * CHUNK:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    release.append(True)
    web.log.clear()
    assert cached.open(url, stat).read(0, len(content)) == content
    assert [request.range[0] for request in web.gets()] == [3 * CHUNK, 4 * CHUNK, 5 * CHUNK]
    assert leftovers(cached) == []


def test_a_partial_file_from_before_the_machine_started_is_not_trusted(
    cached: CachedRemote, web: Any, content: bytes
) -> None:
    url = web.url("/a/x.tar")
    stat = cached.stat(url)
    partial = Path(f"{cached.cache.path(url, stat)}.{stat.size}.part")
    partial.parent.mkdir()
    partial.write_bytes(bytes(CHUNK))  # what a disk holds of a file that was never synced
    os.utime(partial, (1, 1))
    assert whole(cached, url) == content


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_share_one_download(method: str, cached: CachedRemote, web: Any, content: bytes) -> None:
    url = web.url("/a/x.tar")
    stat = cached.stat(url)
    web.before = lambda request: time.sleep(0.02)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=_download, args=(cached, url, stat, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert {queue.get(timeout=60) for _ in children} == {hashlib.sha1(content).hexdigest()}
    for child in children:
        child.join()
    assert len(web.gets()) == len(range(0, len(content), CHUNK))


def test_the_bound_drops_what_was_opened_longest_ago(remote: Remote, web: Any, tmp_path: Path) -> None:
    store = CachedRemote(remote, Cache(str(tmp_path), 3000))
    for letter in "abcd":
        web.files[f"/{letter}.tar"] = letter.encode() * 1000
    urls = {letter: web.url(f"/{letter}.tar") for letter in "abcd"}
    held = {letter: store.open(urls[letter]) for letter in "abc"}
    store.open(urls["a"]).close()
    web.log.clear()
    store.open(urls["d"]).close()
    assert shards(store) == ["a.tar", "c.tar", "d.tar"]
    assert held["b"].read(990, 20) == b"b" * 10, "whoever has it open reads on"
    assert not [request for request in web.gets() if request.path == "/b.tar"]
    assert whole(store, urls["b"]) == b"b" * 1000
    assert shards(store) == ["a.tar", "b.tar", "d.tar"]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 3000
    assert len(list(tmp_path.glob("*.lock"))) == 4, "locks go with their shards; one is for making room"


def test_a_dead_download_makes_room_a_living_one_does_not(remote: Remote, web: Any, tmp_path: Path) -> None:
    from pretrain.data.storage.locks import lock
    from pretrain.data.storage.room import make_room

    dead, wanted = tmp_path / f"{'0' * 16}-a.tar", str(tmp_path / f"{'1' * 16}-b.tar.400.part")
    Path(f"{dead}.700.part").write_bytes(b"x" * 10)
    with lock(f"{dead}.lock"):
        assert not make_room(str(tmp_path), 1000, wanted, 400)
    assert make_room(str(tmp_path), 1000, wanted, 400)
    assert sorted(path.name for path in tmp_path.iterdir()) == [Path(wanted).name, "cache.lock"]


def test_a_shard_over_the_bound_is_an_error_with_the_fix(remote: Remote, web: Any, tmp_path: Path) -> None:
    store = CachedRemote(remote, Cache(str(tmp_path), 1000))
    with pytest.raises(UserError, match=r"data\.cache_gb: .* cannot hold http://.*x\.tar.*raise it"):
        store.open(web.url("/a/x.tar"))


def test_an_object_that_changes_meanwhile_is_refused(cached: CachedRemote, web: Any, content: bytes) -> None:
    url = web.url("/a/x.tar")

    def swap(request: Any) -> None:
        if len(web.gets()) == 3:
            web.files["/a/x.tar"] = content[::-1]

    web.before = swap
    with pytest.raises(UserError, match=f"{url}: changed while it was in use"):
        cached.open(url)
    assert (shards(cached), leftovers(cached)) == ([], [])
    assert whole(cached, url) == content[::-1]


def test_the_same_without_etags(cached: CachedRemote, make_web: Any, content: bytes) -> None:
    web = make_web(etags=False)
    web.files["/x.tar"] = content
    web.headers["Last-Modified"] = "Mon, 01 Jan 2024 00:00:00 GMT"

    def swap(request: Any) -> None:
        if len(web.gets()) == 3:
            web.files["/x.tar"] = content[::-1]
            web.headers["Last-Modified"] = "Tue, 02 Jan 2024 00:00:00 GMT"

    web.before = swap
    with pytest.raises(UserError, match="changed while it was in use"):
        cached.open(web.url("/x.tar"))
    assert (shards(cached), leftovers(cached)) == ([], [])


@pytest.mark.parametrize("header", ["Content-MD5", "Digest"])
def test_a_corrupt_download_is_refused_and_fetched_again(
    header: str, cached: CachedRemote, web: Any, content: bytes, caplog: Any
) -> None:
    name, prefix = ("md5", "") if header == "Content-MD5" else ("sha256", "sha-256=")
    web.headers[header] = prefix + base64.b64encode(hashlib.new(name, content).digest()).decode()
    flips = deque([True])

    def flip(request: Any, body: bytes) -> bytes:
        return body[:-1] + bytes([body[-1] ^ 1]) if flips and flips.pop() else body

    web.body = flip
    assert whole(cached, web.url("/a/x.tar")) == content
    assert [r.getMessage().endswith("downloading it again") for r in caplog.records] == [True]
    assert len(web.gets()) == 2 * len(range(0, len(content), CHUNK))


@dataclass
class Stub:
    """A store whose checksum is that of other bytes."""

    certain: bool
    downloads: int = 0

    def download(self, name: str, stat: Stat, sink: Sink) -> None:
        self.downloads += 1
        sink.append(b"x" * (stat.size - sink.reached))

    def checksum(self, name: str) -> Checksum:
        return Checksum("md5", "0" * 32, self.certain)


def test_a_checksum_that_never_fits(tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.storage.cache._no_md5", set())
    cache, stub = Cache(str(tmp_path), 1000), Stub(certain=True)
    with pytest.raises(UserError, match=r"s3://b/a\.tar: md5 is .*, its store says 0000.*three times"):
        cache.open("s3://b/a.tar", Stat(9, "1"), stub)
    assert stub.downloads == 3
    encrypted = Stub(certain=False)  # as the etags of a bucket with a key service
    assert cache.open("s3://b/a.tar", Stat(9, "1"), encrypted).read(0, 9) == b"x" * 9
    assert encrypted.downloads == 2
    assert "are no md5" in caplog.text
    assert cache.open("s3://b/c.tar", Stat(9, "1"), encrypted).read(0, 9) == b"x" * 9
    assert encrypted.downloads == 3, "said and paid for once"


def test_a_cached_file_that_was_touched_is_judged_by_its_content(
    cached: CachedRemote, web: Any, content: bytes
) -> None:
    url = web.url("/a/x.tar")
    path = Path(cached.cache.path(url, cached.stat(url)))
    assert whole(cached, url) == content
    os.utime(path, (1, 1))
    web.log.clear()
    assert whole(cached, url) == content
    assert not web.gets()
    path.write_bytes(content[:-1] + b"?")
    os.utime(path, (2, 2))
    assert whole(cached, url) == content
    path.write_bytes(content[:-1])
    assert whole(cached, url) == content
    Path(f"{path}.json").write_text("{")
    assert whole(cached, url) == content


def test_a_full_disk_and_a_folder_that_is_none_are_one_line(
    cached: CachedRemote, web: Any, remote: Remote, tmp_path: Path
) -> None:
    url = web.url("/a/x.tar")
    stat = cached.stat(url)
    folder = Path(cached.cache.folder)
    folder.mkdir()
    partial = Path(f"{cached.cache.path(url, stat)}.{stat.size}.part")
    partial.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*No space left.*has room"):
        cached.open(url)
    assert leftovers(cached) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file.* cannot take"):
        CachedRemote(remote, Cache(str(tmp_path / "file"), 1 << 30)).open(url)


def test_downloads_ask_ahead(cached: CachedRemote, web: Any, content: bytes) -> None:
    store = CachedRemote(replace(cached.remote, parallel=4, chunk=20_000), cached.cache)
    assert whole(store, web.url("/a/x.tar")) == content


def test_an_empty_object(cached: CachedRemote, web: Any) -> None:
    web.files["/e.tar"] = b""
    assert whole(cached, web.url("/e.tar")) == b""


def _wander(store: CachedRemote, urls: list[str], seed: int, queue: Any) -> None:
    order, wrong, most = random.Random(seed), list[str](), 0
    for _ in range(60):
        url = order.choice(urls)
        blob = store.open(url)
        taken = sum(int(p.name.split(".")[-2]) for p in Path(store.cache.folder).glob("*.part"))
        for path in Path(store.cache.folder).glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                taken += path.stat().st_size
        most = max(most, taken)
        if blob.read(0, 2000) != url[-5:-4].encode() * 1000:
            wrong.append(url)
        blob.close()
    queue.put((wrong, most))


@pytest.mark.slow
def test_processes_that_crowd_each_other_out_read_right_bytes(remote: Remote, web: Any, tmp_path: Path) -> None:
    store = CachedRemote(remote, Cache(str(tmp_path), 3000))
    for letter in "abcdef":
        web.files[f"/{letter}.tar"] = letter.encode() * 1000
    urls = [web.url(f"/{letter}.tar") for letter in "abcdef"]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_wander, args=(store, urls, seed, queue)) for seed in range(4)]
    for child in children:
        child.start()
    found = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert [wrong for wrong, _ in found] == [[]] * 4
    # A partial file that gets its name between the two looks is counted twice.
    assert max(most for _, most in found) <= 4000
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 3000
    assert not list(tmp_path.glob("*.part"))
