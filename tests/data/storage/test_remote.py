"""Ranged reads of remote shards: right bytes after every kind of fault, and one line where trying again is no use."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import random
import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.storage.base import Missing, Stat
from pretrain.data.storage.remote import Checksum, Remote, _checksum
from pretrain.errors import UserError

PART = (70_000, 150_000)
"""Offset and size of the read that faults hit."""


def test_reads_what_is_asked_for(web: Any, remote: Remote, content: bytes) -> None:
    blob = remote.open(web.url("/a/x.tar"))
    assert blob.stat.size == len(content)
    web.log.clear()
    for offset, size in ((0, 10), (100_000, 5), (len(content) - 7, 100), (len(content), 4), (3, 0)):
        assert blob.read(offset, size) == content[offset : offset + size]
    assert [request.range for request in web.log] == [(0, 9), (100_000, 100_004), (len(content) - 7, len(content) - 1)]


@pytest.mark.parametrize("kind", ["drop", "stall", "truncate", "refuse"])
def test_a_broken_transfer_goes_on_from_the_byte_reached(
    kind: str, web: Any, make_proxy: Callable[[int], Any], remote: Remote, content: bytes, caplog: Any
) -> None:
    proxy = make_proxy(web.port)
    url = web.url("/a/x.tar", proxy.port)
    stat = Stat(len(content), Remote(1).stat(web.url("/a/x.tar")).version)
    web.log.clear()
    proxy.faults.extend([(kind, 60_000)] * 2)
    with caplog.at_level(logging.WARNING, "pretrain"):
        assert remote.read(url, stat, *PART) == content[PART[0] : sum(PART)]
    asked = [request.range for request in web.gets()]
    assert asked[0] == (70_000, 219_999) or kind == "refuse"
    assert all(last == 219_999 for _, last in asked)
    if kind != "refuse":
        # What arrived is not asked for again: each request begins at least a socket's worth after the one before.
        starts = [first for first, _ in asked]
        assert starts == sorted(set(starts))
        assert len(starts) == 3
        assert sum(proxy.passed) < PART[1] + 3 * 1000
    assert caplog.records[0].getMessage().startswith(f"{url}: a transfer failed")


def test_one_line_a_storm(web: Any, remote: Remote, content: bytes, caplog: Any) -> None:
    url = web.url("/a/x.tar")
    blob = remote.open(url)
    web.status["/a/x.tar"] = deque([503, 500, 429, 408, 503])
    with caplog.at_level(logging.WARNING, "pretrain"):
        assert blob.read(5, 5) == content[5:10]
        web.status["/a/x.tar"] = deque([503])
        assert blob.read(9, 5) == content[9:14]
    assert len(caplog.records) == 1, "another read of it in the same minute says nothing new"


def test_patience_ends(web: Any, remote: Remote) -> None:
    blob = remote.open(web.url("/a/x.tar"))
    web.status["/a/x.tar"] = deque([503] * 10_000)
    impatient = replace(remote, retry_s=0.2)
    with pytest.raises(OSError, match=r"after trying again for 0\.2 s \(data\.retry_s\).*503"):
        impatient.read(blob.name, blob.stat, 0, 10)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(OSError, match="cannot be read after trying"):
        impatient.stat(web.url("/a/x.tar", port))


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [(404, Missing, "no such object"), (403, UserError, "access denied"), (400, UserError, "refuses it .status 400")],
)
def test_what_no_patience_helps_is_one_line_at_once(
    status: int, kind: type, says: str, web: Any, remote: Remote
) -> None:
    url = web.url("/a/x.tar")
    blob = remote.open(url)
    web.log.clear()
    web.status["/a/x.tar"] = deque([status] * 2)
    with pytest.raises(kind, match=f"{url}: .*{says}") as error:
        blob.read(0, 10)
    assert "\n" not in str(error.value)
    assert len(web.log) == 1
    web.status["/a/x.tar"] = deque([status] * 2)
    with pytest.raises(kind, match=says):
        remote.stat(url)


@pytest.mark.parametrize("etags", [True, False])
def test_another_object_is_refused_by_name(
    etags: bool, make_web: Any, remote: Remote, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = make_web(etags=etags)
    web.headers["Last-Modified"] = "Mon, 01 Jan 2024 00:00:00 GMT"
    web.files["/x.tar"] = content
    url = web.url("/x.tar")
    blob = remote.open(url)
    web.files["/x.tar"] = bytes(reversed(content))
    web.headers["Last-Modified"] = "Tue, 02 Jan 2024 00:00:00 GMT"
    with pytest.raises(UserError, match=f"{url}: changed while it was in use"):
        remote.open(url, blob.stat).read(0, 10)
    monkeypatch.setattr("pretrain.data.storage.remote._LOOK_AGAIN_S", -1.0)
    with pytest.raises(UserError, match=f"{url}: changed while it was in use"):
        blob.read(0, 10)
    web.files["/x.tar"] = content[:-1]
    with pytest.raises(UserError, match=f"{url}: changed while it was in use"):
        blob.read(0, 10)


def test_a_server_without_ranges_is_named_with_the_fix(make_web: Any, remote: Remote, content: bytes) -> None:
    web = make_web(ranges=False)
    web.files["/x.tar"] = content
    with pytest.raises(UserError, match=r"no byte ranges; set data\.cache_dir"):
        remote.open(web.url("/x.tar")).read(0, 10)


def test_a_missing_driver_names_the_extra(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/x\.tar: no driver.*pip install 'pretrain\[gcs\]'"):
        remote.stat("gs://bucket/x.tar")
    with pytest.raises(UserError, match=r"nonsense://x: .*nonsense"):
        remote.stat("nonsense://x")


def _in_child(blob: Any, store: Any, queue: Any) -> None:
    queue.put((blob.read(1000, 5000), store.stat(blob.name), store.open(blob.name).read(0, 5)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_open_shards_and_storages_travel_to_other_processes(method: str, web: Any, content: bytes) -> None:
    store = storage.make(Data())
    blob = store.open(web.url("/a/x.tar"))
    assert blob.read(0, 9) == content[:9]  # the parent's event loop and connections are alive
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(blob, store, queue))
    child.start()
    assert queue.get(timeout=60) == (content[1000:6000], blob.stat, content[:5])
    child.join(60)
    assert child.exitcode == 0
    assert blob.read(7, 9) == content[7:16]  # and what the child did has not cut them
    assert pickle.loads(pickle.dumps(store)) == store


def test_threads_share_an_open_shard(web: Any, remote: Remote, content: bytes) -> None:
    blob = remote.open(web.url("/a/x.tar"))
    offsets = [random.Random(2).randrange(len(content)) for _ in range(64)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda offset: blob.read(offset, 999), offsets))
    assert found == [content[offset : offset + 999] for offset in offsets]


def test_a_driver_without_an_event_loop(remote: Remote) -> None:
    url = "memory://bucket/a.tar"
    remote.write(url, b"0123456789")
    blob = remote.open(url)
    assert (blob.read(2, 3), blob.read(8, 9)) == (b"234", b"89")
    remote.write("memory://bucket/b.tar", b"")
    assert [name.rpartition("/")[2] for name in remote.names("memory://bucket/*.tar")] == ["a.tar", "b.tar"]
    remote.write(url, b"abcdefghij")
    with pytest.raises(UserError, match="changed while"):
        remote.open(url, blob.stat)
    with pytest.raises(UserError, match="over http"):
        remote.write("http://127.0.0.1/x", b"")


@pytest.mark.parametrize(
    ("name", "info", "expected"),
    [
        (
            "gs://b/x",
            {"etag": "CJ==", "md5Hash": "XrY7u+Ae7tCTyyK7j1rNww=="},
            ("md5", "5eb63bbbe01eeed093cb22bb8f5acdc3"),
        ),
        ("az://b/x", {"content_settings": {"content_md5": bytearray(b"\x01" * 16)}}, ("md5", "01" * 16)),
        ("az://b/x", {"content_settings": {"content_md5": None}}, None),
        ("hf://datasets/a/b/x", {"blob_id": "7", "lfs": {"size": 3, "sha256": "ab" * 32}}, ("sha256", "ab" * 32)),
        ("http://h/x", {"ETag": '"' + "0" * 32 + '"'}, None),
        ("s3://b/x", {"ETag": '"' + "0" * 32 + '-2"'}, None),
        ("s3://b/x", {"ETag": '"' + "0" * 32 + '"'}, ("md5", "0" * 32, False)),
    ],
)
def test_checksums_that_stores_offer(name: str, info: dict[str, Any], expected: tuple | None) -> None:
    assert _checksum(name, info) == (None if expected is None else Checksum(*expected))
