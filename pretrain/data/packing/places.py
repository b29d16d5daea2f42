"""Where packed shards go: a local folder that takes its name when it is whole, or a URL that storage can write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

from pretrain.errors import UserError

ARGUMENTS, WHOLE, UNITS = "arguments.json", "pack.json", "units"
"""What a pack was begun with; the report that says it is whole; a record of each finished unit."""


class Place(Protocol):
    """Travels to worker processes. What is written appears whole or not at all."""

    fresh: bool
    """Whether `begin` found nothing to go on with."""

    def begin(self, arguments: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Start, or go on with what the same arguments began.

        Raises:
            UserError: there is something else, or another process is at work on it.
        """
        ...

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, content: bytes) -> None: ...

    def size(self, name: str) -> int | None:
        """Bytes of what is there; None: nothing is."""
        ...

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A local folder of this process, to build a shard in."""
        ...

    def take(self, name: str, file: Path) -> None:
        """Put a file from the scratch folder in place."""
        ...

    def finish(self, shards: Collection[str]) -> None:
        """It is whole, and these are its tars. UserError: there are others that cannot be removed."""
        ...

    def drop(self) -> None:
        """Remove what was begun, as far as that can be done."""
        ...


def place(out: str | Path) -> Place:
    """The place that a name stands for."""
    if "://" not in str(out):
        return Folder(Path(os.path.abspath(os.path.expanduser(out))))
    return Remote(str(out).rstrip("/"))


class Folder:
    """OUT.partial becomes OUT. The one who packs holds a lock that ends with the process."""

    def __init__(self, out: Path) -> None:
        self._out, self._root = out, out.with_name(f"{out.name}.partial")
        self.fresh = True

    @contextlib.contextmanager
    def begin(self, arguments: dict[str, Any]) -> Iterator[None]:
        if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise UserError(f"pack {self._out}: is already there; name a new folder, or remove it first")
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / ARGUMENTS).open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"pack {self._root}: another process is packing there; wait for it") from None
            begun = self.read(ARGUMENTS) or None
            self.fresh = begun is None
            _compare(begun, arguments, str(self._root))
            if self.fresh:
                file.write(_dump(arguments))
                file.flush()
            for left in self._root.glob("*.tmp"):
                shutil.rmtree(left)
            yield

    def read(self, name: str) -> bytes | None:
        path = self._root / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        with self.scratch() as folder:
            (folder / "file").write_bytes(content)
            self.take(name, folder / "file")

    def size(self, name: str) -> int | None:
        path = self._root / name
        return path.stat().st_size if path.is_file() else None

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self._root, suffix=".tmp") as folder:
            yield Path(folder)

    def take(self, name: str, file: Path) -> None:
        with file.open("rb") as content:
            os.fsync(content.fileno())  # a record of it must not outlive it when the machine goes down
        (self._root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, self._root / name)

    def finish(self, shards: Collection[str]) -> None:
        for path in self._root.rglob("*.tar"):  # of a start whose inputs were others, and that had no record yet
            if path.relative_to(self._root).as_posix() not in shards:
                path.unlink()
        shutil.rmtree(self._root / UNITS, ignore_errors=True)
        (self._root / ARGUMENTS).unlink()
        os.replace(self._root, self._out)

    def drop(self) -> None:
        shutil.rmtree(self._root)


class Remote:
    """Objects under a URL. Nothing can be renamed there, so that pack.json, written last, says that it is whole."""

    def __init__(self, url: str) -> None:
        from pretrain.config import Data
        from pretrain.data import storage

        self._url, self._storage = url, storage.make(Data())
        self.fresh = True

    @contextlib.contextmanager
    def begin(self, arguments: dict[str, Any]) -> Iterator[None]:
        begun = self.read(ARGUMENTS)
        if self.size(WHOLE) is not None or (begun is None and self._storage.names(f"{self._url}/*")):
            raise UserError(f"pack {self._url}: is already there; name a new place, or remove it first")
        self.fresh = begun is None
        _compare(begun, arguments, self._url)
        self.write(ARGUMENTS, _dump(arguments))
        yield

    def read(self, name: str) -> bytes | None:
        try:
            blob = self._storage.open(f"{self._url}/{name}")
        except FileNotFoundError:
            return None
        with contextlib.closing(blob):
            return blob.read(0, blob.stat.size)

    def write(self, name: str, content: bytes) -> None:
        self._storage.write(f"{self._url}/{name}", content)

    def size(self, name: str) -> int | None:
        try:
            return self._storage.stat(f"{self._url}/{name}").size
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="pretrain-pack-") as folder:
            yield Path(folder)

    def take(self, name: str, file: Path) -> None:
        self.write(name, file.read_bytes())

    def finish(self, shards: Collection[str]) -> None:
        strays = [name for name in self._storage.names(f"{self._url}/*.tar") if name.rpartition("/")[2] not in shards]
        if strays:
            raise UserError(f"pack {self._url}: {len(strays)} tars are none of this pack's ({strays[0]}); remove them")

    def drop(self) -> None:
        """Storage removes nothing: the arguments stay, and the same command may go on."""


def _dump(arguments: dict[str, Any]) -> bytes:
    return json.dumps(arguments, indent=2, sort_keys=True, default=str).encode()


def _compare(begun: bytes | None, arguments: dict[str, Any], name: str) -> None:
    """UserError: what was begun had other arguments."""
    if begun is None:
        return
    now = json.loads(_dump(arguments))
    try:
        before = json.loads(begun)
    except ValueError:
        raise UserError(f"pack {name}: {ARGUMENTS} there is damaged; remove it all and start again") from None
    differ = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differ:
        facts = "; ".join(f"{key} was {_short(before.get(key))}, now {_short(now.get(key))}" for key in differ)
        raise UserError(f"pack {name}: was begun with other arguments ({facts}); give the same ones, or remove it")


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 80 else text[:77] + "..."
