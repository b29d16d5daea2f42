"""One part of a remote shard, appended to a buffer as it comes in, so that a broken transfer goes on where it broke.

HTTP and S3 are asked for the version that was opened, in the same request; other drivers are asked for the part alone.
"""

from __future__ import annotations

import re
from typing import Any

from pretrain.data.storage.base import Stat, changed
from pretrain.errors import UserError

_PIECE = 1 << 18
_SLOWEST = 50_000
"""Bytes per second below which a request counts as stalled, for drivers without a timeout of their own."""


class NoRanges(UserError):  # noqa: N818 - named as it is caught
    """The server sends whole files only."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: its server has no byte ranges; set data.cache_dir, which keeps whole shards")


def is_conditional(name: str, stat: Stat) -> bool:
    """Whether a read says by itself that the shard is another one now."""
    if name.startswith(("http://", "https://")):
        return stat.version.startswith('"')  # a weak or no etag cannot be asked for
    return name.startswith(("s3://", "s3a://")) and stat.version.startswith('"')


def fetch(system: Any, name: str, stat: Stat, start: int, stop: int, into: bytearray, stall_s: float) -> None:
    """Append bytes [start, stop) of a shard to `into`; on an error, those that came before it are there.

    Raises:
        NoRanges: its server has none.
        UserError: the shard has changed.
        Exception: whatever the driver raises.
    """
    limit = stall_s + (stop - start) / _SLOWEST
    if name.startswith(("http://", "https://")):
        _wait(system, _http(system, name, stat, start, stop, into), limit)
    elif name.startswith(("s3://", "s3a://")):
        _wait(system, _s3(system, name, stat, start, stop, into), limit)
    else:
        options = {"timeout": limit} if getattr(system, "async_impl", False) else {}
        into += system.cat_file(system._strip_protocol(name), start=start, end=stop, **options)


def fetch_whole(system: Any, name: str, stat: Stat, into: Any, stall_s: float) -> None:
    """Hand a whole shard to `into.append`, from a server without ranges. Raises: as `fetch`."""
    _wait(system, _whole(system, name, into), stall_s + stat.size / _SLOWEST)


def _wait(system: Any, coroutine: Any, limit: float) -> None:
    from fsspec.asyn import sync

    async def run() -> None:
        await coroutine

    sync(system.loop, run, timeout=limit)


async def _http(system: Any, name: str, stat: Stat, start: int, stop: int, into: bytearray) -> None:
    headers = dict(system.kwargs.get("headers", {})) | {"Range": f"bytes={start}-{stop - 1}"}
    if is_conditional(name, stat):
        headers["If-Match"] = stat.version
    session = await system.set_session()
    async with session.get(system.encode_url(name), **{**system.kwargs, "headers": headers}) as reply:
        reply.raise_for_status()
        if reply.status != 206:
            raise NoRanges(name)
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
        if not span or int(span[1]) != start or span[2] not in ("*", str(stat.size)):
            raise changed(name)
        async for piece in reply.content.iter_chunked(_PIECE):
            into += piece


async def _s3(system: Any, name: str, stat: Stat, start: int, stop: int, into: bytearray) -> None:
    bucket, key, version = system.split_path(name)
    condition = {"IfMatch": stat.version} if is_conditional(name, stat) else {}
    condition |= {"VersionId": version} if version else {}
    reply = await system._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **condition)
    async with reply["Body"] as body:
        while piece := await body.read(_PIECE):
            into += piece


async def _whole(system: Any, name: str, into: Any) -> None:
    session = await system.set_session()
    async with session.get(system.encode_url(name), **system.kwargs) as reply:
        reply.raise_for_status()
        async for piece in reply.content.iter_chunked(_PIECE):
            into.append(piece)
