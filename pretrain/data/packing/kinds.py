"""Pairs from elsewhere -> WebDataset shards in img2dataset's layout: KEY.jpg or .png, KEY.txt, KEY.json.

A packed folder appears under its name only when it is whole; a command that was stopped goes on when it is repeated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import Data
from pretrain.data.images.decode import BadSample
from pretrain.data.packing.digits import CLASSES, digit_pairs
from pretrain.data.packing.engine import PackReport, pack
from pretrain.data.packing.how import How
from pretrain.data.packing.places import Folder
from pretrain.data.packing.polish import Polish
from pretrain.data.packing.repack import ShardInputs
from pretrain.data.packing.tables import read_rows
from pretrain.data.packing.writing import Members, members_of, write_shards
from pretrain.data.texts.captions import captions_of, parse_meta
from pretrain.errors import UserError

__all__ = ["How", "PackReport", "pack_digits", "pack_folder", "pack_shards", "pack_table"]


def pack_digits(out: Path, /, *, samples_per_shard: int = 256, size: int = 32) -> PackReport:
    """The 1797 handwritten digits that come with scikit-learn, captioned, in a training and a held-out part.

    Writes OUT/train/*.tar, OUT/eval/*.tar (a fixed fifth of each class) and OUT/classes.json for zero-shot evaluation.

    Args:
        out: Folder to make.
        samples_per_shard: Pairs in each tar.
        size: Pixels of a side; the originals have 8.
    """
    how = How(samples_per_shard=samples_per_shard)
    if size < 1:
        raise UserError(f"size {size} must be at least 1 pixel")
    place = Folder(Path(os.path.abspath(out)))
    with place.begin({"kind": "digits", "size": size, "samples_per_shard": how.samples_per_shard}):
        try:
            splits = digit_pairs(size)
        except UserError:
            place.drop()
            raise
        shards = {name: _write_split(place, name, split, samples_per_shard) for name, split in splits.items()}
        place.write("classes.json", (json.dumps(CLASSES, indent=2) + "\n").encode())
        tars = [f"{name}/{n:05d}.tar" for name, count in shards.items() for n in range(count)]
        size = sum(place.size(tar) or 0 for tar in tars)
        place.finish(tars)
    return PackReport(str(out), {name: len(items) for name, items in splits.items()}, shards, size)


def _write_split(place: Folder, name: str, pairs: Sequence[Any], samples_per_shard: int) -> int:
    with place.scratch() as folder:
        count = write_shards(folder, (members_of(*pair) for pair in pairs), samples_per_shard)
        for shard in sorted(folder.iterdir()):
            place.take(f"{name}/{shard.name}", shard)
    return count


def pack_folder(source: Path, out: str | Path, /, *, how: How | None = None) -> PackReport:
    """Every image under a folder that has a text or json of the same name beside it.

    Args:
        source: Folder, searched with all its subfolders, in the order of the names.
        out: Folder to make, or a URL to write to.
        how: Options that all kinds share.
    """
    if not source.is_dir():
        raise UserError(f"pack folder {source}: is no folder")
    return pack("folder", FolderInputs(source), out, how or How())


def pack_table(
    table: Path,
    out: str | Path,
    /,
    *,
    image_column: str = "filepath",
    caption_columns: tuple[str, ...] = ("title",),
    label_column: str | None = None,
    image_root: Path | None = None,
    how: How | None = None,
) -> PackReport:
    """The rows of a CSV, TSV or Parquet file with a column of image paths and one or more of captions.

    Args:
        table: File; its name's ending says which kind.
        out: Folder to make, or a URL to write to.
        image_column: Column of image paths.
        caption_columns: Columns of captions; blank cells are passed over.
        label_column: Column of class numbers, for zero-shot evaluation.
        image_root: Folder that relative image paths start from; default: the table's.
        how: Options that all kinds share.
    """
    inputs = TableInputs(table, image_root or table.parent, image_column, tuple(caption_columns), label_column)
    return pack("table", inputs, out, how or How())


def pack_shards(
    patterns: Sequence[str],
    out: str | Path,
    /,
    *,
    image_keys: tuple[str, ...] = Data.image_keys,
    text_keys: tuple[str, ...] = Data.text_keys,
    how: How | None = None,
) -> PackReport:
    """The samples of WebDataset shards again, such as smaller or cleaned; keys and further members stay as they are.

    Args:
        patterns: Shards: paths, URLs, globs and brace patterns.
        out: Folder to make, or a URL to write to.
        image_keys: Tar member extensions that hold the image, first match wins.
        text_keys: Where captions are, and are cleaned: a text member, or 'json:FIELD'.
        how: Options that all kinds share.
    """
    how = how or How()
    inputs = ShardInputs(patterns, tuple(image_keys), tuple(text_keys), how.index_dir)
    return pack("shards", inputs, out, how)


class FolderInputs:
    """Images of a folder. The list is made once, and stays in the process that made it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        images = [
            path.relative_to(root).parts
            for path in root.rglob("*")
            if path.suffix.lower().lstrip(".") in Data.image_keys
        ]
        self._names = ["/".join(parts) for parts in sorted(images)]
        self.facts = {"source": os.path.abspath(root)}
        self.total = len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_names": []}

    def items(self) -> Iterator[str]:
        return iter(self._names)

    def name(self, item: str) -> str:
        return str(self._root / item)

    def read(self, item: str, polish: Polish) -> tuple[None, Members]:
        path = self._root / item
        meta = _beside(path)
        return None, _pair(path, meta | {"file": item}, polish)


class TableInputs:
    """Rows of a table, read by one process, one at a time."""

    total = None

    def __init__(self, table: Path, root: Path, image: str, captions: tuple[str, ...], label: str | None) -> None:
        self._table, self._root, self._columns = table, root, (image, captions, label)
        self.facts = {
            "source": os.path.abspath(table),
            "image_root": os.path.abspath(root),
            "image_column": image,
            "caption_columns": list(captions),
            "label_column": label,
        }

    def items(self) -> Iterator[tuple[str, list[str], dict[str, int]]]:
        return read_rows(self._table, *self._columns)

    def name(self, item: tuple[str, list[str], dict[str, int]]) -> str:
        return str(self._root / item[0])

    def read(self, item: tuple[str, list[str], dict[str, int]], polish: Polish) -> tuple[None, Members]:
        path, texts, label = item
        return None, _pair(self._root / path, {"captions": texts, "file": path} | label, polish)


def _pair(path: Path, meta: dict[str, Any], polish: Polish) -> Members:
    captions = polish.captions(captions_of({}, meta, ("json:caption", "json:captions")))
    image, extension, _ = polish.image(path.read_bytes(), path.suffix.lower().lstrip("."))
    return members_of(image, extension, captions, {key: value for key, value in meta.items() if key != "caption"})


def _beside(path: Path) -> dict[str, Any]:
    """The json of the same name, with the text of the same name as its first caption. BadSample: one is damaged."""
    beside = path.with_suffix(".json")
    meta = parse_meta(beside.read_bytes() if beside.is_file() else None)
    text = path.with_suffix(".txt")
    members = {"txt": text.read_bytes()} if text.is_file() else {}
    if not meta and not members:
        raise BadSample(f"there is no {text.name} or {beside.name} beside it")
    return meta | {"captions": captions_of(members, meta, Data.text_keys)}
