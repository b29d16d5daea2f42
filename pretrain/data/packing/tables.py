"""Tables of image paths and captions: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import UserError

Row = tuple[str, list[str], dict[str, int]]
"""Image path, captions, and {'label': n} or nothing."""


def read_rows(table: Path, image: str, captions: tuple[str, ...], label: str | None) -> Iterator[Row]:
    """The rows of a table, one at a time.

    Args:
        image: column of paths.
        captions: columns of captions; in Parquet a cell may be a list.
        label: column of class numbers.

    Raises:
        UserError: the file cannot be read, a column is missing, or a label is no integer.
    """
    wanted = [image, *captions, *([label] if label else [])]
    for number, row in enumerate(_records(table, wanted), start=1):
        cells = [row[column] for column in captions]
        texts = [str(text) for cell in cells for text in (cell if isinstance(cell, list) else [cell]) if text]
        yield str(row[image]), texts, {} if label is None else {"label": _integer(row[label], table, number)}


def _records(table: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    kinds = {".csv": _delimited, ".tsv": _delimited, ".parquet": _parquet}
    if table.suffix.lower() not in kinds:
        raise UserError(f"pack table {table}: must end in {', '.join(kinds)}")
    try:
        yield from kinds[table.suffix.lower()](table, columns)
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"pack table {table}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _delimited(table: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 24)
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
        _check(table, columns, list(reader.fieldnames or []))
        yield from reader


def _parquet(table: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise UserError("pack table of Parquet needs pyarrow: pip install 'pretrain[table]'") from None
    try:
        with parquet.ParquetFile(table) as file:
            _check(table, columns, file.schema_arrow.names)
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise UserError(f"pack table {table}: is no Parquet file: {' '.join(str(error).split())}") from None


def _check(table: Path, wanted: list[str], there: list[str]) -> None:
    missing = [column for column in wanted if column not in there]
    if missing:
        raise UserError(f"pack table {table}: has no column {', '.join(missing)}; it has {', '.join(there)}")


def _integer(cell: Any, table: Path, number: int) -> int:
    try:
        return int(cell)
    except (TypeError, ValueError):
        raise UserError(f"pack table {table}: row {number} has label {cell!r}, which is no integer") from None
