"""Files that somebody may be writing at this moment: what is not whole yet is left for the next look."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

Record = dict[str, Any]
SMALL, TAIL = 1 << 23, 1 << 18
"""Bytes: a file that is read whole, and the end of one that is looked at."""


def whole(path: Path) -> Iterator[bytes]:
    """Lines of a file that end as lines do; none where there is no such file."""
    with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def objects(lines: Iterable[bytes]) -> Iterator[Record]:
    """The JSON objects among lines; a torn line is no object."""
    for line in lines:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def tail(path: Path, size: int = TAIL) -> list[Record]:
    """The objects that the last `size` bytes of a file hold whole."""
    with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        start = max(0, file.seek(0, 2) - size)
        file.seek(start)
        lines = file.read(size).split(b"\n")
        return list(objects(lines[1 if start else 0 : -1]))
    return []


def thinned(path: Path, most: int = 2000) -> list[Record]:
    """All objects of a small file; of a larger one `most`, from places that are equally far apart."""
    size = path.stat().st_size if path.is_file() else 0
    return list(objects(whole(path) if size <= SMALL else _picked(path, size, most)))


def document(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or it is no JSON."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    return None


def _picked(path: Path, size: int, most: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for n in range(most):
            file.seek(n * size // most)
            if n:
                file.readline()
            line = file.readline()
            if line.endswith(b"\n"):
                yield line
