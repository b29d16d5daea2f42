"""How a checkpoint's files reach the disk, and how they are known to be whole.

Tensors are safetensors and everything else is JSON or text, so that reading a stranger's checkpoint runs no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON.

    Raises:
        TypeError: the value holds something that JSON has no form for.
    """
    write_text(path, _json(value))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device, layout and aliasing, bit for bit, and fsync.

    Raises:
        OSError: the disk is full or failing.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(_plain(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    # safetensors leaves its files readable by the owner alone, whatever the umask says.
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        OSError: the file is missing or is not a whole safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def digest(path: Path) -> dict[str, int | str]:
    """Size in bytes and xxh3_64 (hexadecimal) of a file."""
    state, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            size += len(chunk)
    return {"size": size, "xxh3_64": state.hexdigest()}


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """Digest of each path, by its name relative to `folder`."""
    return {path.relative_to(folder).as_posix(): digest(path) for path in paths}


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename is not until its folder is synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(folder: Path, found: Mapping[str, Any]) -> None:
    """Write the manifest, then COMMIT, which holds the manifest's own digest: the last byte of a good checkpoint."""
    for name in sorted({(folder / name).parent for name in found}):
        sync_folder(name)
    write_json(folder / MANIFEST, dict(sorted(found.items())))
    sync_folder(folder)
    write_json(folder / COMMIT, digest(folder / MANIFEST))
    sync_folder(folder)


def fault(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a sealed folder, as 'file: reason'; None: nothing.

    Args:
        contents: read and hash every file; otherwise only compare sizes.
    """
    try:
        if (folder / COMMIT).read_bytes() != _json(digest(folder / MANIFEST)).encode():
            return f"{MANIFEST}: differs from what {COMMIT} says of it"
        manifest = json.loads((folder / MANIFEST).read_text())
        return next((text for name, want in manifest.items() if (text := _differs(folder, name, want, contents))), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name}: missing"
    except (OSError, ValueError) as error:
        return f"{folder.name}: {error}"


def _differs(folder: Path, name: str, want: dict[str, Any], contents: bool) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name}: missing"
    size = path.stat().st_size
    if size != want["size"]:
        return f"{name}: {size} bytes instead of {want['size']}"
    return f"{name}: contents changed (xxh3_64)" if contents and digest(path) != want else None


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU, contiguous, no two on one storage (safetensors refuses aliases; each name gets its own copy)."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen and value.numel() else value
        seen.add(storage)
    return plain
