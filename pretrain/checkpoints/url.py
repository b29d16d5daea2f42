"""A file or folder behind a URL that fsspec has a driver for, with those methods of pathlib.Path that checkpoints need.

Object stores have no rename and no folders: an object is there when it is whole, and a folder is what names share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain.data.storage import drivers
from pretrain.data.storage.faults import persist
from pretrain.errors import UserError

T = TypeVar("T")
RETRY_S, STALL_S = 60.0, 30.0
"""How long a failing request is tried again, and how long a silent one counts as on its way."""


@dataclass(frozen=True)
class Url:
    """Missing objects raise FileNotFoundError; what the store refuses is a UserError, what lasts an OSError."""

    url: str

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The folder that it lies in."""
        return Url(self.url.rstrip("/").rpartition("/")[0])

    def resolve(self) -> Url:
        """Itself: a URL has no links and no working folder."""
        return self

    def read_bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of the object."""
        return bytes(self._do(lambda system, path: system.cat_file(path, start=start or None, end=stop)))

    def read_text(self) -> str:
        """The whole object, as UTF-8."""
        return self.read_bytes().decode()

    def write(self, chunks: Callable[[], Iterable[Any]]) -> None:
        """Put an object there.

        Args:
            chunks: its bytes, anew at each call: a transfer that broke is begun again.
        """

        def attempt(system: Any, path: str) -> None:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with system.open(path, "wb") as file:
                for chunk in chunks():
                    file.write(chunk)

        self._do(attempt)

    def size(self) -> int:
        """Bytes of the object."""
        return int(self._do(lambda system, path: system.info(path))["size"])

    def exists(self) -> bool:
        """Whether there is such an object or folder."""
        return bool(self._do(lambda system, path: system.exists(path)))

    def iterdir(self) -> list[Url]:
        """What lies directly in the folder; nothing where there is no such folder."""
        try:
            found = self._do(lambda system, path: system.ls(path, detail=False))
        except FileNotFoundError:
            return []
        names = sorted({str(path).rstrip("/").rpartition("/")[2] for path in found} - {"", self.name})
        return [self / name for name in names]

    def remove(self) -> None:
        """Take away the object, or the folder with all it holds."""
        self._do(lambda system, path: system.rm(path, recursive=True))

    def _do(self, attempt: Callable[[Any, str], T]) -> T:
        def once() -> T:
            system = drivers.system(self.url, STALL_S)
            system.invalidate_cache()  # other processes write here too
            return attempt(system, str(system._strip_protocol(self.url)))

        try:
            return persist(self.url, RETRY_S, once)
        except UserError:
            raise
        except OSError as error:
            raise OSError(str(error).replace(" (data.retry_s)", "")) from error


Folder = Path | Url
"""A file or folder, here or elsewhere."""


def folder_of(name: str | Path) -> Folder:
    """A path, or a URL; 'file://PATH' is a path."""
    text = str(name)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return Url(text.rstrip("/")) if re.match(r"\w[\w+.-]*://", text) else Path(name)


def read_range(path: Folder, start: int, size: int) -> bytearray:
    """`size` bytes of a file from `start`.

    Raises:
        OSError: the file is missing, or ends before.
    """
    if isinstance(path, Url):
        content = bytearray(path.read_bytes(start, start + size)) if size else bytearray()
    else:
        content = bytearray(size)
        with path.open("rb") as file:
            file.seek(start)
            del content[file.readinto(content) :]
    if len(content) != size:
        raise OSError(f"{path}: ends at byte {start + len(content)}, before {start + size}")
    return content


def size_of(path: Folder) -> int:
    """Bytes of a file. Raises: FileNotFoundError."""
    return path.size() if isinstance(path, Url) else path.stat().st_size
