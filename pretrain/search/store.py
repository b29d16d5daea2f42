"""Features on a disk: a folder with meta.json and a part for each shard.

A part is `part-RANK-SHARD.TOWER.npy`, [rows, D] with a row for each image or caption, `.TOWER.jsonl` with a line for
each row, and `.json`, which is written last and tells how long the others are: a part without it is not finished. So a
process that is killed at any moment leaves only whole parts and remains that the next start sweeps.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import checkpoint_files as files
from pretrain.errors import UserError

FORMAT = "pretrain-features-1"
META, _LOCK = "meta.json", ".lock"
TOWERS = ("image", "text")


@dataclass(frozen=True)
class Part:
    """The features of one shard."""

    name: str
    """part-RANK-SHARD, of the rank that wrote it."""
    shard: int
    """Number in the list of shards."""
    rows: dict[str, int]
    """Tower -> features."""
    sizes: dict[str, int]
    """End of a file's name -> bytes."""
    left_out: list[str]
    """Samples that cannot be used, each with the reason."""

    def whole(self, folder: Path) -> bool:
        """Whether its files are there and as long as they were."""
        paths = {folder / f"{self.name}.{end}": size for end, size in self.sizes.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def write_part(
    folder: Path,
    rank: int,
    shard: int,
    features: Mapping[str, np.ndarray],
    entries: Mapping[str, Sequence[Mapping[str, Any]]],
    left_out: Sequence[str],
) -> Part:
    """Put the features of a shard there, durably.

    Args:
        features: tower -> [rows, D].
        entries: tower -> what each row is.

    Raises:
        OSError: the disk is full or failing.
    """
    name = f"part-{rank:04d}-{shard:04d}"
    sizes = {}
    for tower, array in features.items():
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries[tower]).encode()
        for end, put in (
            (f"{tower}.npy", _putting(array)),
            (f"{tower}.jsonl", lambda file, text=lines: file.write(text)),
        ):
            sizes[end] = _write(folder / f"{name}.{end}", put)
    part = Part(name, shard, {tower: len(array) for tower, array in features.items()}, sizes, list(left_out))
    files.sync_folder(folder)
    files.write_atomic(folder / f"{name}.json", json.dumps(asdict(part)) + "\n")
    return part


def parts(folder: Path) -> list[Part]:
    """What is finished, by the number of the shard; parts whose files are gone or cut short are none."""
    found: dict[int, Part] = {}
    for path in sorted(folder.glob("part-*.json")):
        part = _read(path)
        if part is not None and part.whole(folder):
            found.setdefault(part.shard, part)
    return [found[shard] for shard in sorted(found)]


def sweep(folder: Path, keep: Sequence[Part]) -> None:
    """Remove what killed processes left unfinished."""
    names = {part.name for part in keep}
    for path in [*folder.glob("part-*"), *folder.glob(".part-*"), *folder.glob(f".{META}.*")]:
        if path.name.partition(".")[0] not in names:
            path.unlink(missing_ok=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """What the features are of, and by which model.

    Raises:
        UserError: this is no folder of features.
    """
    try:
        found: dict[str, Any] = json.loads((folder / META).read_text())
        known = found["format"] == FORMAT
    except FileNotFoundError:
        raise UserError(f"{folder} holds no features ({META} is missing): make them with pretrain embed") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META} cannot be read ({' '.join(str(error).split())}): embed again") from None
    if not known:
        raise UserError(f"{folder / META} is of format {found['format']}, this release reads {FORMAT}: embed again")
    return found


def write_meta(folder: Path, meta: Mapping[str, Any], finished: Sequence[Part]) -> None:
    """Create or replace meta.json; `finished` there is for its reader, the parts themselves are what counts."""
    told = [{"part": part.name, "shard": part.shard, "rows": part.rows} for part in finished]
    files.write_atomic(folder / META, json.dumps({**meta, "finished": told}, indent=1) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other start out of the folder, which is made where there is none.

    Raises:
        UserError: another start writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"{folder} is being written by {file.read().strip()}: wait for it, or stop it") from None
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield


def _putting(array: np.ndarray) -> Callable[[BufferedWriter], Any]:
    return lambda file: np.save(file, array, allow_pickle=False)


def _write(path: Path, put: Callable[[BufferedWriter], Any]) -> int:
    """Bytes of a file that is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        put(file)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(aside, path)
    return size


def _read(path: Path) -> Part | None:
    try:
        return Part(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return None  # not ours, or damaged: its shard counts as not embedded
