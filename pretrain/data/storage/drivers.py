"""fsspec's filesystems: one of each kind in a process, none of them ever used after a fork.

A driver of a network store runs an event loop in a thread of its own, and a forked process inherits the loop without
the thread. So a process makes its own drivers. Those of its parent are kept and never touched: finalizing one would
take the parent's sockets out of the poll set that both share.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any
from urllib.parse import urlsplit

_lock = threading.Lock()
_systems: dict[tuple[int, int | None, str, str, float], Any] = {}
"""(process, thread where a driver is not asynchronous, protocol, host or bucket, stall limit) -> driver."""


def system(name: str, stall_s: float) -> Any:
    """The driver of a URL for this process.

    Raises:
        ImportError: it is not installed.
        ValueError: fsspec knows no such protocol.
    """
    protocol, host = name.partition("://")[0], urlsplit(name).netloc
    places = [(os.getpid(), thread, protocol, host, stall_s) for thread in (None, threading.get_ident())]
    with _lock:
        found = next((_systems[place] for place in places if place in _systems), None)
        if found is None:
            found = _make(name, protocol, stall_s)
            _systems[places[0 if getattr(found, "async_impl", False) else 1]] = found
        return found


def _make(name: str, protocol: str, stall_s: float) -> Any:
    import fsspec

    made, _ = fsspec.core.url_to_fs(name, skip_instance_cache=True, **_options(protocol, stall_s))
    if protocol in ("s3", "s3a"):
        made.retries = 1  # we try again ourselves: s3fs would not go on from the byte reached
    return made


def _options(protocol: str, stall_s: float) -> dict[str, Any]:
    """What makes a driver fail instead of hang, and never answer from memory; the user's fsspec settings go first."""
    from fsspec.config import conf

    ours = dict[str, Any]()
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        ours = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
    elif protocol in ("s3", "s3a"):
        limits = {"connect_timeout": stall_s, "read_timeout": stall_s, "retries": {"max_attempts": 0}}
        ours = {"config_kwargs": limits, "use_listings_cache": False}
    theirs = conf.get(protocol, {})
    return {k: v | theirs.get(k, {}) if isinstance(v, dict) else theirs.get(k, v) for k, v in ours.items()}


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    if "fsspec.asyn" in sys.modules:
        sys.modules["fsspec.asyn"].reset_lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)
