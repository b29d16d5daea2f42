"""Pairs from elsewhere -> WebDataset shards in img2dataset's layout: KEY.jpg or .png, KEY.txt, KEY.json.

A packed folder appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.config import Data
from pretrain.data.captions import captions_of, parse_meta
from pretrain.data.decode import BadSample, decode
from pretrain.data.digits import CLASSES, digit_pairs
from pretrain.data.tables import read_rows
from pretrain.errors import UserError

_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Pair:
    """One sample on its way into a shard."""

    image: bytes
    extension: str
    captions: list[str]
    meta: dict[str, Any]


@dataclass(frozen=True)
class PackReport:
    """What was packed."""

    folder: str
    samples: dict[str, int]
    """By split; '' where there is only one."""
    shards: dict[str, int]
    skipped: tuple[str, ...] = ()
    """What was left out and why, a line each."""


def pack_digits(out: Path, /, *, samples_per_shard: int = 256, size: int = 32) -> PackReport:
    """The 1797 handwritten digits that come with scikit-learn, captioned, in a training and a held-out part.

    Writes OUT/train/*.tar, OUT/eval/*.tar (a fixed fifth of each class) and OUT/classes.json for zero-shot evaluation.

    Args:
        out: Folder to make.
        samples_per_shard: Pairs in each tar.
        size: Pixels of a side; the originals have 8.
    """
    _check(samples_per_shard, size)
    with _whole(out) as folder:
        splits = digit_pairs(size)
        pairs = {name: [Pair(*pair) for pair in split] for name, split in splits.items()}
        shards = {name: write_shards(folder / name, items, samples_per_shard) for name, items in pairs.items()}
        (folder / "classes.json").write_text(json.dumps(CLASSES, indent=2) + "\n")
    return PackReport(str(out), {name: len(items) for name, items in pairs.items()}, shards)


def pack_folder(
    source: Path, out: Path, /, *, samples_per_shard: int = 10_000, resize: int | None = None
) -> PackReport:
    """Every image under a folder that has a text or json of the same name beside it.

    Args:
        source: Folder, searched with all its subfolders, in the order of the names.
        out: Folder to make.
        samples_per_shard: Pairs in each tar.
        resize: Shrink the shorter side to this many pixels; default: files go in as they are.
    """
    _check(samples_per_shard, resize)
    if not source.is_dir():
        raise UserError(f"pack folder {source}: is no folder")
    images = sorted(path for path in source.rglob("*") if path.suffix.lower().lstrip(".") in Data.image_keys)
    names = [(path, {"file": path.relative_to(source).as_posix()}) for path in images]
    return _pack(((path, _beside(path), meta) for path, meta in names), out, samples_per_shard, resize)


def pack_table(
    table: Path,
    out: Path,
    /,
    *,
    image_column: str = "filepath",
    caption_columns: tuple[str, ...] = ("title",),
    label_column: str | None = None,
    image_root: Path | None = None,
    samples_per_shard: int = 10_000,
    resize: int | None = None,
) -> PackReport:
    """The rows of a CSV, TSV or Parquet file with a column of image paths and one or more of captions.

    Args:
        table: File; its name's ending says which kind.
        out: Folder to make.
        image_column: Column of image paths.
        caption_columns: Columns of captions; blank cells are passed over.
        label_column: Column of class numbers, for zero-shot evaluation.
        image_root: Folder that relative image paths start from; default: the table's.
        samples_per_shard: Pairs in each tar.
        resize: Shrink the shorter side to this many pixels; default: files go in as they are.
    """
    _check(samples_per_shard, resize)
    root = image_root or table.parent
    rows = read_rows(table, image_column, caption_columns, label_column)
    items = ((root / path, {"captions": texts}, {"file": path} | label) for path, texts, label in rows)
    return _pack(items, out, samples_per_shard, resize)


def write_shards(folder: Path, pairs: Iterable[Pair], samples_per_shard: int) -> int:
    """Number the pairs and write them as 00000.tar, 00001.tar, ...; returns how many shards.

    Key = shard number and place in it, as img2dataset has it; no name, time or owner of this machine goes in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard, tar = -1, None
    with contextlib.ExitStack() as closing:
        for number, pair in enumerate(pairs):
            if number % samples_per_shard == 0:
                closing.close()
                shard += 1
                tar = closing.enter_context(tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT))
            assert tar is not None
            key = f"{shard:05d}{number % samples_per_shard:05d}"
            for extension, content in _members(pair):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return shard + 1


def _members(pair: Pair) -> list[tuple[str, bytes]]:
    meta = pair.meta | {"captions": pair.captions}
    texts = [("txt", pair.captions[0].encode()), ("json", json.dumps(meta, ensure_ascii=False).encode())]
    return [(pair.extension, pair.image), *texts]


def _pack(
    items: Iterable[tuple[Path, dict[str, Any], dict[str, Any]]], out: Path, samples_per_shard: int, resize: int | None
) -> PackReport:
    """Items are (image path, its json with captions, what to add to that)."""
    skipped: list[str] = []
    packed = 0

    def pairs() -> Iterator[Pair]:
        nonlocal packed
        for path, meta, more in items:
            try:
                pair = _pair(path, meta | more, resize)
            except (BadSample, OSError) as error:
                skipped.append(f"{path}: {getattr(error, 'strerror', None) or error}")
                continue
            packed += 1
            yield pair

    with _whole(out) as folder:
        shards = write_shards(folder, pairs(), samples_per_shard)
        if not packed:
            raise UserError(f"pack: no pair of image and caption was found{', ' + skipped[0] if skipped else ''}")
    return PackReport(str(out), {"": packed}, {"": shards}, tuple(skipped))


def _pair(path: Path, meta: dict[str, Any], resize: int | None) -> Pair:
    if "problem" in meta:
        raise BadSample(meta["problem"])
    captions = captions_of({}, meta, ("json:caption", "json:captions"))
    if not captions:
        raise BadSample("there is no caption")
    data = path.read_bytes()
    image = decode(data)
    if resize is not None and min(image.size) > resize:
        data, extension = _shrunk(image, resize), "jpg"
    else:
        extension = _EXTENSION.get(Image.open(io.BytesIO(data)).format or "", path.suffix.lower().lstrip("."))
    return Pair(data, extension, captions, {key: value for key, value in meta.items() if key != "caption"})


def _beside(path: Path) -> dict[str, Any]:
    """The json of the same name, with the text of the same name as its first caption."""
    try:
        member = path.with_suffix(".json").read_bytes() if path.with_suffix(".json").is_file() else None
        meta = parse_meta(member)
        text = path.with_suffix(".txt")
        members = {"txt": text.read_bytes()} if text.is_file() else {}
        return meta | {"captions": captions_of(members, meta, Data.text_keys)}
    except BadSample as bad:
        return {"problem": str(bad)}


def _shrunk(image: Image.Image, side: int) -> bytes:
    ratio = side / min(image.size)
    size = (max(side, round(image.width * ratio)), max(side, round(image.height * ratio)))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def _check(samples_per_shard: int, size: int | None) -> None:
    if not 1 <= samples_per_shard <= 100_000:
        raise UserError(f"samples_per_shard {samples_per_shard} must lie between 1 and 100000")
    if size is not None and size < 1:
        raise UserError(f"size {size} must be at least 1 pixel")


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder that takes its name when the block is left without an error, and is removed otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"pack {out}: is already there; name a new folder, or remove it first")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary)
        raise
