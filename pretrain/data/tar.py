"""What lies where in a tar file, read from its headers alone: nothing is extracted, no link is followed.

Faster than the standard library's reader, which matters when ten thousand shards are opened for the first time.
Understands ustar, GNU and pax archives; skips links, devices, folders and sparse files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from pretrain.errors import UserError

_BLOCK = 512
_MAX_EXTENSION = 1 << 20
"""Bytes of a pax or long-name record; real ones have some hundred."""
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes: whatever their size field says, no content follows."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file inside a tar."""

    name: str
    offset: int
    """Byte at which its content starts."""
    size: int


def members(path: str) -> tuple[list[Member], str]:
    """The regular files of an uncompressed tar, in order, and a digest of its headers and of how each content begins.

    Raises:
        UserError: the file is no tar, is compressed, damaged, or cut short.
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        found = list(_walk(path, file.fileno(), digest))
    return found, digest.hexdigest()


def _walk(path: str, fd: int, digest: xxhash.xxh3_128) -> Iterator[Member]:
    end = os.fstat(fd).st_size
    at, extension = 0, dict[str, str]()
    while at < end:
        block = os.pread(fd, 2 * _BLOCK, at)
        header = block[:_BLOCK]
        if not header.strip(b"\0"):
            return
        _check(path, header, at)
        digest.update(block)
        kind, body = header[156:157], at + _BLOCK
        size = (
            0 if kind in _WITHOUT_CONTENT else _number(path, extension.get("size", "").encode() or header[124:136], at)
        )
        if kind == b"S":
            body += _sparse_map(fd, header, body)
        at = body + -(-size // _BLOCK) * _BLOCK
        if body + size > end:
            raise UserError(f"{path}: is cut short at byte {end} inside {_name(header)!r}; copy the shard again")
        if kind in (b"x", b"L"):
            extension |= _extension(path, kind, os.pread(fd, min(size, _MAX_EXTENSION + 1), body))
            continue
        if kind in _REGULAR and not any(key.startswith("GNU.sparse") for key in extension):
            yield Member(extension.get("path", _name(header)), body, size)
        if kind not in (b"g", b"K"):
            extension = {}


def _check(path: str, header: bytes, at: int) -> None:
    if len(header) < _BLOCK:
        raise UserError(f"{path}: is cut short at byte {at + len(header)}; copy the shard again")
    if at == 0 and header[:2] == b"\x1f\x8b":
        raise UserError(f"{path}: is compressed, and samples are read at random; unpack it with gunzip")
    stored = header[148:156].strip(b" \0")
    unsigned = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])  # as some old writers counted
    if not re.fullmatch(b"[0-7]+", stored) or int(stored, 8) not in (unsigned, signed):
        raise UserError(f"{path}: has no tar header at byte {at}; it is damaged or no tar: copy the shard again")


def _number(path: str, field: bytes, at: int) -> int:
    """A size: octal in a header, decimal (and unpadded) in a pax record, binary past 8 GiB in GNU's form."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not re.fullmatch(b"[0-9]+", digits):
        raise UserError(f"{path}: has an unreadable size at byte {at}; it is damaged: copy the shard again")
    return int(digits, 8 if len(field) == 12 else 10)


def _sparse_map(fd: int, header: bytes, body: int) -> int:
    """Bytes of the extra headers of a GNU sparse file."""
    at, more = body, bool(header[482])
    while more:
        block = os.pread(fd, _BLOCK, at)
        at, more = at + _BLOCK, len(block) == _BLOCK and bool(block[504])
    return at - body


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _extension(path: str, kind: bytes, body: bytes) -> dict[str, str]:
    """What a pax header, or GNU's long-name record, says about the member that follows it."""
    if len(body) > _MAX_EXTENSION:
        raise UserError(f"{path}: has a member name record of more than {_MAX_EXTENSION} bytes; that is no data shard")
    if kind == b"L":
        return {"path": _text(body.partition(b"\0")[0])}
    said: dict[str, str] = {}
    while body.strip(b"\0"):
        length, space, _ = body.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(body):
            raise UserError(f"{path}: has a malformed pax header; it is damaged: copy the shard again")
        key, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        said[_text(key)] = _text(value)
        body = body[int(length) :]
    return said


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
