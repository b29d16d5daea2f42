"""A real S3 protocol on loopback, through s3fs, with connections that break."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from pretrain.data.storage import CachedRemote
from pretrain.data.storage.base import Missing
from pretrain.data.storage.cache import Cache
from pretrain.data.storage.remote import Checksum, Remote
from pretrain.errors import UserError

URL = "s3://shards/part/a-00.tar"


@pytest.fixture
def bucket(s3: Callable[[int], None], remote: Remote, content: bytes) -> Iterator[Remote]:
    """A storage, with `URL` in the store."""
    system = remote.system(URL)
    system.mkdir("shards")
    remote.write(URL, content)
    yield remote
    system.rm("shards", recursive=True)


def test_reads_lists_and_writes(bucket: Remote, content: bytes) -> None:
    blob = bucket.open(URL)
    assert blob.stat.size == len(content)
    assert blob.read(100_000, 70_000) == content[100_000:170_000]
    bucket.write("s3://shards/part/a-01.tar", b"x")
    assert bucket.names("s3://shards/part/a-*.tar") == [URL, "s3://shards/part/a-01.tar"]
    assert bucket.checksum(URL) == Checksum("md5", blob.stat.version.strip('"'), certain=False)


def test_another_object_is_refused_by_name(bucket: Remote, content: bytes) -> None:
    blob = bucket.open(URL)
    bucket.write(URL, content[::-1])
    with pytest.raises(UserError, match=f"{URL}: changed while it was in use"):
        blob.read(0, 10)
    with pytest.raises(UserError, match=f"{URL}: changed while it was in use"):
        bucket.open(URL, blob.stat).read(0, 10)
    assert bucket.open(URL).read(0, 10) == content[::-1][:10]


def test_what_no_patience_helps_is_one_line(bucket: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s3://shards/none.tar", "s3://no-such-bucket/a.tar"):
        with pytest.raises(Missing, match=f"{name}: there is no such object"):
            bucket.stat(name)
    for name in ("s3://b/x.tar", "s3://a!b/x.tar"):  # the store refuses the one, the driver the other
        with pytest.raises(UserError, match=f"{name}: .*check the URL"):
            bucket.stat(name)
    from pretrain.data.storage import drivers

    monkeypatch.setattr(drivers, "_systems", {})
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(UserError, match=f"{URL}: access denied .*NoCredentialsError") as error:
        bucket.stat(URL)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "stall", "truncate", "refuse"])
def test_broken_transfers(
    kind: str, bucket: Remote, s3: Any, s3_port: int, make_proxy: Any, content: bytes, tmp_path: Any
) -> None:
    blob = bucket.open(URL)
    proxy = make_proxy(s3_port)
    s3(proxy.port)
    proxy.faults.extend([(kind, 90_000)] * 2)
    assert blob.read(50_000, 200_000) == content[50_000:250_000]
    assert kind == "refuse" or sum(proxy.passed) < 200_000 + 10_000, "what had arrived was sent again"
    s3(proxy.port)
    proxy.faults.extend([(kind, 90_000)] * 3)
    cached = CachedRemote(bucket, Cache(str(tmp_path), 1 << 30))
    assert cached.open(URL).read(0, len(content)) == content
    assert not proxy.faults


def _read(blob: Any, queue: Any) -> None:
    queue.put(blob.read(1000, 5000))


def test_an_open_shard_travels_to_a_fork(bucket: Remote, content: bytes) -> None:
    blob = bucket.open(URL)
    assert blob.read(0, 9) == content[:9]  # the parent's event loop and connections are alive
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read, args=(blob, queue))
    child.start()
    assert queue.get(timeout=60) == content[1000:6000]
    child.join(60)
    assert child.exitcode == 0
    assert blob.read(7, 9) == content[7:16]


def test_an_upload_in_parts_is_cached_too(bucket: Remote, content: bytes, tmp_path: Any) -> None:
    large = content * 35  # its etag is no md5, and says so
    system = bucket.system(URL)
    system.pipe_file("shards/large.tar", large, chunksize=5 << 20)
    assert bucket.checksum("s3://shards/large.tar") is None
    cached = CachedRemote(replace(bucket, chunk=1 << 20, parallel=4), Cache(str(tmp_path), 1 << 30))
    assert cached.open("s3://shards/large.tar").read(0, len(large)) == large
