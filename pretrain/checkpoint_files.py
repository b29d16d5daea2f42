"""How a checkpoint's files reach the disk, and how they are known to be whole.

Tensors are safetensors and everything else is JSON or text, so that reading a stranger's checkpoint runs no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from pretrain.checkpoints import state
from pretrain.checkpoints import tensors as formats
from pretrain.checkpoints.pieces import whole
from pretrain.checkpoints.url import Folder, Url, read_range, size_of

MANIFEST, COMMIT = "manifest.json", "COMMIT"
_CHUNK = 1 << 24


def write_text(path: Path, text: str) -> None:
    """Write a small file that is on the disk, not in a cache, when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, text: str) -> None:
    """Create or replace a small file; whoever reads at any moment sees the whole old or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_text(temp, text)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_anywhere(path: Folder, text: str) -> None:
    """`write_atomic`, or the same in a store."""
    if isinstance(path, Url):
        path.write(lambda: [text.encode()])
    else:
        write_atomic(path, text)


def write_plain(path: Folder, text: str) -> None:
    """`write_text`, or the same in a store."""
    if isinstance(path, Url):
        path.write(lambda: [text.encode()])
    else:
        write_text(path, text)


def write_tensors(path: Folder, tensors: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Write whole tensors of any device, layout and aliasing, bit for bit and durably; the file's digest.

    Raises:
        OSError: the disk is full or failing.
    """
    return formats.write(path, [whole(name, tensor) for name, tensor in tensors.items()])


def read_tensors(path: Folder) -> dict[str, Tensor]:
    """Whole tensors of a safetensors file, on the CPU.

    Raises:
        OSError: the file is missing or is not a whole safetensors file.
    """
    return dict(formats.Stored([path]))


def digest(path: Folder) -> dict[str, int | str]:
    """Size in bytes and xxh3_64 (hexadecimal) of a file."""
    state, size, left = xxhash.xxh3_64(), 0, size_of(path)
    while left:
        chunk = read_range(path, size, min(left, _CHUNK))
        state.update(chunk)
        size, left = size + len(chunk), left - len(chunk)
    return {"size": size, "xxh3_64": state.hexdigest()}


def digest_of(text: str) -> dict[str, int | str]:
    """Digest of a text's file, without the file."""
    content = text.encode()
    return {"size": len(content), "xxh3_64": xxhash.xxh3_64(content).hexdigest()}


def names_in(folder: Folder) -> list[str]:
    """Names that lie directly in a folder, sorted; none where there is no such folder."""
    if isinstance(folder, Url):
        return [entry.name for entry in folder.iterdir()]
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def sync_folder(folder: Folder) -> None:
    """Make the names in a folder durable: a rename is not until its folder is synced. A store has no such thing."""
    if isinstance(folder, Url):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Folder, found: Mapping[str, Any]) -> None:
    """Write down size and hash of each file, by its name relative to the folder."""
    for name in sorted({(folder / name).parent for name in found}, key=str):
        sync_folder(name)
    write_plain(folder / MANIFEST, _json(dict(sorted(found.items()))))
    sync_folder(folder)


def commit(folder: Folder) -> None:
    """Write COMMIT, which holds the manifest's own digest: the last byte of a good checkpoint."""
    write_plain(folder / COMMIT, _json(digest(folder / MANIFEST)))
    sync_folder(folder)


def manifest(folder: Folder) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of a checkpoint.

    Raises:
        OSError: manifest or COMMIT are missing.
        ValueError: they do not fit each other, or do not vouch for what every checkpoint has.
    """
    text = (folder / MANIFEST).read_bytes()
    if (folder / COMMIT).read_bytes() != _json(digest_of(text.decode())).encode():
        raise ValueError(f"{MANIFEST}: differs from what {COMMIT} says of it")
    found: dict[str, dict[str, Any]] = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{MANIFEST}: holds a {type(found).__name__}, not size and hash by name")
    if absent := state.absent(found):
        raise ValueError(f"{MANIFEST}: does not list {absent[0]}")
    odd = [name for name, entry in found.items() if not isinstance(entry, dict) or {"size", "xxh3_64"} - set(entry)]
    if odd:
        raise ValueError(f"{MANIFEST}: holds no size and hash of {odd[0]}, but {str(found[odd[0]])[:40]!r}")
    if outside := [name for name in found if name.startswith("/") or ".." in name.split("/")]:
        raise ValueError(f"{MANIFEST}: {outside[0]} lies outside of the checkpoint")
    return found


def faults(folder: Folder, *, contents: bool = True, share: slice = slice(None)) -> Iterator[str]:
    """What is wrong with a committed folder, each as 'file: reason'.

    Args:
        contents: read and hash every file; otherwise only compare sizes.
        share: of the files by name; several ranks look at a part each.
    """
    try:
        entries = list(manifest(folder).items())
    except FileNotFoundError as error:
        yield f"{Path(str(error.filename or _missing(folder))).name}: missing"
        return
    except (OSError, ValueError) as error:
        told = str(error)
        yield told if told.startswith(MANIFEST) else f"{folder.name}: {told}"
        return
    for name, want in entries[share]:
        if reason := _differs(folder, name, want, contents):
            yield reason


def fault(folder: Folder, *, contents: bool = True, share: slice = slice(None)) -> str | None:
    """The first of `faults`; None: nothing is wrong."""
    return next(faults(folder, contents=contents, share=share), None)


def _missing(folder: Folder) -> str:
    return next((name for name in (MANIFEST, COMMIT) if not (folder / name).exists()), folder.name)


def _differs(folder: Folder, name: str, want: dict[str, Any], contents: bool) -> str | None:
    path = folder / name
    try:
        size = size_of(path)
        if size != want["size"]:
            return f"{name}: {size} bytes instead of {want['size']}"
        return f"{name}: contents changed (xxh3_64)" if contents and digest(path) != want else None
    except (FileNotFoundError, NotADirectoryError):
        return f"{name}: missing"
    except (OSError, TypeError, KeyError) as error:
        return f"{name}: {error}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
