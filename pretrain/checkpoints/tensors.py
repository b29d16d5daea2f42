"""Tensors in safetensors files, whole or in pieces, written in one pass and read in part.

Pieces say in the file's header where they belong, as torch.distributed.checkpoint's HuggingFaceStorageWriter does, so
that its HuggingFaceStorageReader, and for whole tensors any reader of safetensors, reads these files too. The library's
own writer is not used: here bytes are hashed on their way, go to any store, and are never in memory twice.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from pretrain.checkpoints.pieces import Piece
from pretrain.checkpoints.url import Folder, Url, read_range, size_of

SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
           "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
           "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH, _LONGEST = 8, 100_000_000
"""Bytes that hold a header's length, and the longest header, as the safetensors library has it."""


def write(path: Folder, pieces: Iterable[Piece]) -> dict[str, int | str]:
    """Write pieces to a file that is durable when this returns; its size in bytes and its xxh3_64 (hexadecimal).

    Args:
        pieces: at most one of each name; on any device, of any layout.

    Raises:
        OSError: the disk or the store is full or failing.
    """
    ordered = sorted(pieces, key=lambda piece: (-piece.tensor.element_size(), piece.name))
    hashed = _Hashed()
    if isinstance(path, Url):
        path.write(lambda: hashed.again(_chunks(ordered)))
        return hashed.digest()
    try:
        with path.open("wb", buffering=0) as file:
            for chunk in hashed.again(_chunks(ordered)):
                _write_all(file, chunk)
            os.fsync(file.fileno())
    except OSError as error:  # a failing write does not say of which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return hashed.digest()


@dataclass(frozen=True)
class Part:
    """Where a block of a tensor lies."""

    file: Folder
    start: int
    """Its first byte in the file."""
    dtype: torch.dtype
    offset: tuple[int, ...]
    size: tuple[int, ...]

    def read(self, first: Sequence[int], size: Sequence[int]) -> Tensor:
        """A box of the block; the rows that it spans are read, and no others."""
        row = math.prod(self.size[1:]) * self.dtype.itemsize
        rows, skipped = (size[0], first[0]) if self.size else (1, 0)
        content = read_range(self.file, self.start + skipped * row, rows * row)
        flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        block = flat.view(self.dtype).view((rows, *self.size[1:]) if self.size else ())
        return block[tuple(slice(a, a + n) for a, n in zip((0, *first[1:]), size, strict=True))] if self.size else block


class Stored(Mapping[str, Tensor]):
    """Tensors by name that are read when they are asked for, whole or in part; on the CPU. Engines take it as it is."""

    def __init__(self, files: Iterable[Folder]) -> None:
        """
        Args:
            files: all that hold pieces of these tensors; their headers are read now.

        Raises:
            OSError: a file cannot be read or is no safetensors file.
        """
        self._parts: dict[str, list[Part]] = {}
        for file in files:
            for name, part in _header(file):
                self._parts.setdefault(name, []).append(part)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.part(name, (0,) * len(shape), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __len__(self) -> int:
        return len(self._parts)

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor, without reading it."""
        ends = [[a + n for a, n in zip(part.offset, part.size, strict=True)] for part in self._parts[name]]
        return torch.Size(max(column) for column in zip(*ends, strict=True))

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it."""
        return self._parts[name][0].dtype

    def part(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of a tensor that starts at `offset`, of whatever pieces hold it.

        Raises:
            OSError: a file cannot be read, or no piece holds some of it.
        """
        found = torch.empty(tuple(size), dtype=self.dtype(name))
        filled = 0
        for part in self._parts[name]:
            low = [max(a, b) for a, b in zip(offset, part.offset, strict=True)]
            ends = zip(offset, size, part.offset, part.size, strict=True)
            extent = [min(a + n, b + m) - first for first, (a, n, b, m) in zip(low, ends, strict=True)]
            if all(length > 0 for length in extent):
                box = part.read([a - b for a, b in zip(low, part.offset, strict=True)], extent)
                if list(extent) == list(size):
                    return box
                found[tuple(slice(a - b, a - b + n) for a, b, n in zip(low, offset, extent, strict=True))] = box
                filled += box.numel()
        if filled != found.numel():
            raise OSError(f"{self._parts[name][0].file}: pieces of {name} are missing")
        return found


def _chunks(pieces: Sequence[Piece]) -> Iterator[Any]:
    """The bytes of a file: length of the header, header, tensors end to end."""
    metadata = {"format": "pt"}
    if not all(piece.is_whole for piece in pieces):
        metadata[SHARDING] = json.dumps({piece.name: {OFFSETS: list(piece.offset)} for piece in pieces})
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.tensor.numel() * piece.tensor.element_size()
        shape = list(piece.tensor.shape)
        header[piece.name] = {"dtype": _NAMES[piece.tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH)
    yield len(text).to_bytes(_LENGTH, "little") + text
    for piece in pieces:
        if piece.tensor.numel():
            flat = piece.tensor.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data


def _write_all(file: io.FileIO, chunk: Any) -> None:
    left = memoryview(chunk)
    while len(left):  # a write takes at most 2 GiB
        left = left[file.write(left) :]


def _header(file: Folder) -> Iterator[tuple[str, Part]]:
    try:
        total = size_of(file)
        length = int.from_bytes(read_range(file, 0, _LENGTH), "little")
        if length > min(total - _LENGTH, _LONGEST):
            raise OSError(f"{file}: is no safetensors file")
        header = json.loads(read_range(file, _LENGTH, length))
        sharding = json.loads(header.pop("__metadata__", {}).get(SHARDING, "{}"))
        for name, entry in header.items():
            size, dtype = tuple(map(int, entry["shape"])), _DTYPES[entry["dtype"]]
            offset = tuple(map(int, sharding[name][OFFSETS])) if sharding else (0,) * len(size)
            start, end = (_LENGTH + length + int(at) for at in entry["data_offsets"])
            if end - start != math.prod(size) * dtype.itemsize or end > total or len(offset) != len(size):
                raise OSError(f"{file}: {name} is not where the header says")
            yield name, Part(file, start, dtype, offset, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{file}: is no safetensors file ({type(error).__name__}: {error})") from error


class _Hashed:
    """Hashes and counts what passes."""

    def again(self, chunks: Iterable[Any]) -> Iterator[Any]:
        """The chunks, from a fresh start."""
        self._state, self._size = xxhash.xxh3_64(), 0
        for chunk in chunks:
            self._state.update(chunk)
            self._size += len(chunk)
            yield chunk

    def digest(self) -> dict[str, int | str]:
        return {"size": self._size, "xxh3_64": self._state.hexdigest()}
