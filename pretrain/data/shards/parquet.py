"""The table that img2dataset writes beside a shard: one row a sample, found by its `key` column."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import xxhash

from pretrain.data.storage import Missing, Stat, Storage
from pretrain.errors import UserError

PREFIX = "parquet:"
_KEY = "key"
_FOOTER = 1 << 16
"""Bytes at a table's end that tell versions of it apart: sizes, places and statistics of its columns stand there."""


def beside(shard: str) -> str:
    """'a/00000.tar' -> 'a/00000.parquet'."""
    folder, slash, name = shard.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}.parquet"


def columns_of(text_keys: Iterable[str]) -> list[str]:
    """The columns that entries of data.text_keys name."""
    return [key.removeprefix(PREFIX) for key in text_keys if key.startswith(PREFIX)]


def check_installed(field: str) -> None:
    """UserError: what reads parquet is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{field}: reading parquet needs pyarrow; pip install 'pretrain[table]'")


def digest(shard: str, storage: Storage, texts: Sequence[str]) -> str:
    """Of the table beside a shard: its size and its footer; '' where there is none, if `texts` allows that.

    Raises: as `Table` where there is none.
    """
    stat = _stat(beside(shard), storage, texts)
    if stat is None:
        return ""
    blob = storage.open(beside(shard), stat)
    try:
        footer = blob.read(max(0, stat.size - _FOOTER), min(stat.size, _FOOTER))
    finally:
        blob.close()
    return xxhash.xxh3_128_hexdigest(footer + str(stat.size).encode())


class Table:
    """The rows of one shard, kept in columns until they are asked for.

    Args:
        texts: columns that must be there.
        others: further ones, as far as they are there and hold scalars; None: all such.

    Raises:
        UserError: there is no table but `texts` are asked for, it is damaged, or a column is missing.
    """

    def __init__(self, shard: str, storage: Storage, texts: Sequence[str], others: Sequence[str] | None) -> None:
        self._columns: dict[str, Any] = {}
        self._rows: dict[str, int] = {}
        self._others: list[str] = []
        name = beside(shard)
        stat = _stat(name, storage, texts)
        if stat is not None:
            self._read(name, _whole(name, stat, storage), texts, others)

    def meta(self, key: str) -> dict[str, Any]:
        """The scalars of a sample; {} where it has no row."""
        return self._values(key, self._others)

    def texts(self, key: str, columns: Iterable[str]) -> dict[str, Any]:
        """The values of text columns of a sample; {} where it has no row."""
        return self._values(key, columns)

    def _values(self, key: str, columns: Iterable[str]) -> dict[str, Any]:
        row = self._rows.get(key)
        row = self._rows.get(key.rpartition("/")[2]) if row is None else row
        if row is None:
            return {}
        return {name: value for name in columns if (value := self._columns[name][row].as_py()) is not None}

    def _read(self, name: str, content: bytes, texts: Sequence[str], others: Sequence[str] | None) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
            schema = file.schema_arrow
            if missing := [column for column in (_KEY, *texts) if column not in schema.names]:
                has = ", ".join(schema.names)
                raise UserError(f"data.text_keys: {name} has no column {missing[0]!r}, only {has}")
            self._others = [
                field.name for field in schema
                if (others is None or field.name in others) and not pyarrow.types.is_nested(field.type)
            ]  # fmt: skip
            # Threads of pyarrow's own would not live in a fork of this process.
            table = file.read(columns=sorted({_KEY, *texts, *self._others}), use_threads=False)
        except pyarrow.ArrowException as error:
            raise UserError(f"{name}: is no good parquet file ({' '.join(str(error).split())[:200]})") from None
        self._columns = {column: table.column(column).combine_chunks() for column in table.column_names}
        for row, key in enumerate(self._columns[_KEY].to_pylist()):
            self._rows.setdefault(str(key), row)


def _stat(name: str, storage: Storage, texts: Sequence[str]) -> Stat | None:
    try:
        return storage.stat(name)
    except Missing:
        if texts:
            raise UserError(f"data.text_keys {PREFIX}{texts[0]}: {name} is missing beside its shard") from None
        return None


def _whole(name: str, stat: Stat, storage: Storage) -> bytes:
    blob = storage.open(name, stat)
    try:
        return blob.read(0, stat.size)
    finally:
        blob.close()
