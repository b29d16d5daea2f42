"""Which failures of a transfer pass by themselves, how long to wait for that, and what to say of the others.

Drivers raise what their libraries do. Nothing here imports them: an error is told by its HTTP status, by its errno,
and by the library that it comes from.
"""

from __future__ import annotations

import errno
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pretrain.data.storage.base import Missing, changed
from pretrain.errors import UserError

T = TypeVar("T")

_LIBRARIES = {"aiohttp", "botocore", "aiobotocore", "urllib3", "requests", "httpx", "httpcore", "gcsfs", "google",
              "azure", "adlfs", "huggingface_hub", "s3fs", "fsspec", "asyncio", "http", "ssl", "paramiko"}  # fmt: skip
_BUSY = {408, 409, 423, 425, 429}
"""The 4xx that ask for patience."""
_FINAL = {errno.EINVAL, errno.EPERM, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.ENAMETOOLONG}
_UNSIGNED = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "ProfileNotFound", "TokenRetrieval",
             "DefaultCredentials")  # fmt: skip
_WRONG = ("ParamValidation", "InvalidConfig", "InvalidRegion", "InvalidEndpoint", "UnknownService")
"""What a driver refuses before it asks anybody."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "http": "http",
           "https": "http"}  # fmt: skip

_SAY_AGAIN_S = 60.0
_said: dict[str, float] = {}
"""Shard -> when this process last said that it is trying again."""

log = logging.getLogger("pretrain")


def refusal(name: str, error: BaseException) -> UserError | None:
    """What to tell the user where trying again cannot help; None where it can.

    Raises:
        Exception: `error` itself, where it is none of a storage's: a defect.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, ImportError):
        return UserError(f"{name}: no driver for this URL ({_line(error)}); {_extra(name)}")
    chain = list(_chain(error))
    code = next(filter(None, map(status, chain)), None)
    if isinstance(error, TimeoutError) or (code is not None and (code >= 500 or code in _BUSY)):
        return None
    if code in (401, 403) or any(
        isinstance(e, PermissionError) or type(e).__name__.startswith(_UNSIGNED) for e in chain
    ):
        return UserError(f"{name}: access denied ({_line(error)}); {_access(name)}")
    if code in (404, 410) or (isinstance(error, FileNotFoundError) and not any(map(_passes, chain[1:]))):
        return Missing(f"{name}: there is no such object; check the URL")
    if code in (412, 416):  # it is not the version asked for; it no longer has these bytes
        return changed(name)
    if code is not None and code >= 400:
        return UserError(f"{name}: the store refuses it (status {code}, {_line(error)}); check the URL")
    wrong = any(type(e).__name__.startswith(_WRONG) for e in chain)
    if any(map(_passes, chain)) and not wrong:
        return None
    if wrong or isinstance(error, OSError | ValueError):
        return UserError(f"{name}: cannot be read ({_line(error)}); check the URL")
    raise error


class Patience:
    """Waits between attempts at one shard, longer each time, until `retry_s` seconds went by without any progress."""

    FIRST_S, LONGEST_S = 0.2, 20.0

    def __init__(self, name: str, retry_s: float) -> None:
        self.name, self.retry_s = name, retry_s
        self.progress()

    def progress(self) -> None:
        """Bytes have come: the next failure is a new one."""
        self._since: float | None = None
        self._turn = 0

    def failed(self, error: Exception) -> None:
        """Wait before another attempt; the n-th wait has between 0.1 * 2**n and 0.2 * 2**n seconds, at most 20.

        Raises:
            UserError: no other attempt can help.
            OSError: it has failed for `retry_s` seconds.
        """
        final = refusal(self.name, error)
        if final is not None:
            raise final from error
        now = time.monotonic()
        if self._since is None:
            self._since = now
            if now - _said.get(self.name, -math.inf) > _SAY_AGAIN_S:
                _said[self.name] = now
                log.warning("%s: a transfer failed (%s); trying again for %g s", self.name, _line(error), self.retry_s)
        left = self._since + self.retry_s - now
        if left <= 0:
            tried = f"after trying again for {self.retry_s:g} s (data.retry_s)"
            raise OSError(f"{self.name}: cannot be read {tried}: {_line(error)}") from error
        longest = min(self.LONGEST_S, self.FIRST_S * 2**self._turn)
        time.sleep(min(left, longest * random.uniform(0.5, 1.0)))  # ranks that failed together come back apart
        self._turn += 1


def persist(name: str, retry_s: float, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, at the first time that it does. Raises: as `Patience.failed`."""
    patience = Patience(name, retry_s)
    while True:
        try:
            return attempt()
        except Exception as error:  # judged there, and raised again unless it is a failure that may pass
            patience.failed(error)


def status(error: BaseException) -> int | None:
    """The HTTP status that an error of any of the drivers carries."""
    if type(error).__module__ == "aiohttp.http_exceptions":
        return None  # the parser's own, which says 400 of an answer that broke off
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None)
    for attribute in ("status", "status_code", "code"):
        found = found or getattr(error, attribute, None)
    try:
        return int(found) if found and 100 <= int(found) < 600 else None
    except (TypeError, ValueError):  # a code in words
        return None


def _passes(error: BaseException) -> bool:
    if isinstance(error, ValueError | FileNotFoundError | PermissionError | ImportError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _FINAL
    return type(error).__module__.split(".")[0] in _LIBRARIES


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec says so of every failed HEAD
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


def _access(name: str) -> str:
    public = ", or set FSSPEC_S3_ANON=true for a public bucket" if name.startswith("s3") else ""
    return f"check the credentials and what they allow{public}"


def _extra(name: str) -> str:
    extra = _EXTRAS.get(name.partition("://")[0])
    return f"pip install 'pretrain[{extra}]'" if extra else "install the package that it names"
