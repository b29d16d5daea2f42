"""Servers and a proxy for a test, and storages that lose patience soon."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.storage.faults import Patience
from pretrain.data.storage.remote import Remote

CHUNK = 1 << 16


def _servers() -> Any:
    spec = importlib.util.spec_from_file_location("tests_storage_servers", Path(__file__).parent / "servers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


servers = _servers()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "FIRST_S", 0.01)
    monkeypatch.setattr(Patience, "LONGEST_S", 0.05)


@pytest.fixture
def remote() -> Remote:
    """Gives up after 10 s, takes 0.5 s of silence for a stall, downloads 64 KiB at a time."""
    return Remote(retry_s=10.0, stall_s=0.5, chunk=CHUNK, parallel=1)


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(5 * CHUNK + 1234)


@pytest.fixture
def make_web() -> Iterator[Callable[..., Any]]:
    made = []

    def make(**options: bool) -> Any:
        made.append(servers.Web(**options))
        return made[-1]

    yield make
    for web in made:
        web.close()


@pytest.fixture
def web(make_web: Callable[..., Any], content: bytes) -> Any:
    """A server of '/a/x.tar' with ranges."""
    made = make_web()
    made.files["/a/x.tar"] = content
    return made


@pytest.fixture
def make_proxy() -> Iterator[Callable[[int], Any]]:
    made = []

    def make(port: int) -> Any:
        made.append(servers.Proxy(port))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    moto = pytest.importorskip("moto.server", reason="moto[s3], flask and flask-cors are not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`s3(port)` sends s3:// to a port of loopback, as FSSPEC_S3_ENDPOINT_URL would; to moto's at first."""
    from fsspec.config import conf

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def point_at(port: int) -> None:
        from pretrain.data.storage import drivers

        monkeypatch.setattr(drivers, "_systems", {})  # endpoints do not change within a run
        monkeypatch.setitem(conf, "s3", {"endpoint_url": f"http://127.0.0.1:{port}"})

    point_at(s3_port)
    return point_at
