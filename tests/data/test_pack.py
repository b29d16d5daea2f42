"""Packers: what goes in comes out, through our reader and through the webdataset library."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.config import Data
from pretrain.data.images.decode import decode
from pretrain.data.packing.digits import NAMES, slant
from pretrain.data.packing.kinds import How, pack_digits, pack_folder, pack_table
from pretrain.data.shards.index import expand
from pretrain.data.shards.reader import RawSample, ShardSource
from pretrain.errors import UserError

ONE = How(samples_per_shard=1, workers=1)
DIGIT_WORDS = {word: n for n, word in enumerate(NAMES)} | {str(n): n for n in range(10)}


def samples(folder: Path) -> list[RawSample]:
    source = ShardSource(expand([f"{folder}/*.tar"]), Data(), field="test")
    return [source.sample(number) for number in range(len(source))]


def by_webdataset(folder: Path) -> list[dict[str, Any]]:
    webdataset = pytest.importorskip("webdataset")
    return list(webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("pack") / "digits"
    report = pack_digits(out)
    assert report.samples == {"train": 1438, "eval": 359}
    assert report.shards == {"train": 6, "eval": 2}
    return out


def test_digits_hold_the_original_pixels_once_each(digits: Path) -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    packed = Counter()
    for split in ("train", "eval"):
        for item in samples(digits / split):
            image = decode(item.image_bytes)
            assert image.size == (32, 32)
            packed[image.convert("L").tobytes(), item.meta["label"]] += 1
    expected = Counter()
    for pixels, label in zip(original.images, original.target, strict=True):
        image = Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        expected[image.tobytes(), int(label)] += 1
    assert packed == expected


def test_digits_split_is_stratified_and_fixed(digits: Path, tmp_path: Path) -> None:
    counts = {split: Counter(item.meta["label"] for item in samples(digits / split)) for split in ("train", "eval")}
    for label in range(10):
        share = counts["eval"][label] / (counts["eval"][label] + counts["train"][label])
        assert abs(share - 0.2) < 0.004
    pack_digits(tmp_path / "again")
    for path in [*digits.rglob("*.tar"), digits / "classes.json"]:
        assert (tmp_path / "again" / path.relative_to(digits)).read_bytes() == path.read_bytes()


def test_digits_captions_name_their_class_and_no_other(digits: Path) -> None:
    classes = json.loads((digits / "classes.json").read_text())
    pools: dict[int, set[tuple[str, ...]]] = {}
    for split in ("train", "eval"):
        for item in samples(digits / split):
            label = item.meta["label"]
            assert len(item.captions) == 8
            assert item.captions == item.meta["captions"]
            for text in item.captions:
                named = {DIGIT_WORDS[w] for w in re.findall(r"\w+", text.lower()) if w in DIGIT_WORDS}
                assert named == {label}, text
            pools.setdefault(label, set()).add(tuple(item.captions[:6]))
            assert {t.format(classes["names"][label]) for t in classes["templates"]} <= set(item.captions)
    assert all(len(pool) == 1 for pool in pools.values()), "plain captions are the class's"
    assert len({pool for pools in pools.values() for pool in pools}) == 10


def test_digits_property_captions_follow_the_picture(digits: Path) -> None:
    ink: dict[str, list[float]] = {}
    for item in samples(digits / "train"):
        pixels = np.asarray(decode(item.image_bytes).convert("L")).astype(float)
        for word in ("bold", "thin"):
            if f" {word} " in item.captions[6]:
                ink.setdefault(word, []).append(pixels.mean())
    assert min(map(len, ink.values())) > 400
    assert np.mean(ink["bold"]) > 1.2 * np.mean(ink["thin"])
    assert slant(np.eye(8)[::-1]) > 0.5, "like a slash, it leans to the right"
    assert slant(np.eye(8)) < -0.5


def test_webdataset_reads_our_shards(digits: Path) -> None:
    theirs, ours = by_webdataset(digits / "eval"), samples(digits / "eval")
    assert len(theirs) == len(ours) == 359
    assert len({item["__key__"] for item in theirs}) == 359
    for their, our in zip(theirs, ours, strict=True):
        assert their["__key__"] == our.key.split("/")[1]
        assert their["png"] == our.image_bytes
        assert their["txt"].decode() == our.captions[0]
        assert json.loads(their["json"]) == our.meta


def write_image(path: Path, size: tuple[int, int] = (40, 20)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_folder(tmp_path: Path) -> None:
    place, out = tmp_path / "in", tmp_path / "out"
    first = write_image(place / "a.b.jpg")
    (place / "a.b.txt").write_text("eine Katze, ä\n")
    second = write_image(place / "sub" / "c.PNG")
    (place / "sub" / "c.json").write_text(json.dumps({"caption": "x", "captions": ["y", "x"], "label": 4, "more": [1]}))
    write_image(place / "alone.webp")
    (place / "broken.jpg").write_bytes(b"<html>")
    (place / "broken.txt").write_text("z")
    report = pack_folder(place, out, how=ONE)
    assert (report.samples, report.shards) == ({"": 2}, {"": 2})
    assert [line.split(": ")[0].rsplit("/")[-1] for line in report.first_skipped] == ["alone.webp", "broken.jpg"]
    assert sum(report.skipped.values()) == 2
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 1, "00003.tar": 1}
    items = samples(out)
    assert [item.image_bytes for item in items] == [first, second]
    assert [item.captions for item in items] == [["eine Katze, ä"], ["x", "y"]]
    assert items[1].meta == {"captions": ["x", "y"], "label": 4, "more": [1], "file": "sub/c.PNG"}
    assert [item.key for item in items] == ["00000.tar/0000000000", "00003.tar/0000300000"]
    assert [set(item) & {"jpg", "png"} for item in by_webdataset(out)] == [{"jpg"}, {"png"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_extension_is_the_contents(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "a.txt").write_text("a")
    pack_folder(tmp_path / "in", tmp_path / "out", how=How(workers=1))
    assert "png" in by_webdataset(tmp_path / "out")[0]


def test_resize(tmp_path: Path) -> None:
    for name, size in (("large.png", (80, 40)), ("small.png", (15, 10))):
        write_image(tmp_path / "in" / name, size)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("a")
    pack_folder(tmp_path / "in", tmp_path / "out", how=How(resize=20, workers=1))
    assert [Image.open(io.BytesIO(item.image_bytes)).size for item in samples(tmp_path / "out")] == [(40, 20), (15, 10)]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_table(tmp_path: Path, kind: str) -> None:
    images = [write_image(tmp_path / "images" / f"{n}.jpg") for n in range(3)]
    rows = [
        {"path": f"images/{n}.jpg", "short": f'"cat", {n}', "long": ["a long\nline", "", "b"][n], "class": 5 + n}
        for n in range(3)
    ]
    rows.append({"path": "images/none.jpg", "short": "s", "long": "l", "class": 0})
    table = write_table(tmp_path / f"t.{kind}", rows)
    options: Any = {"image_column": "path", "caption_columns": ("short", "long"), "how": How(workers=1)}
    report = pack_table(table, tmp_path / "out", label_column="class", **options)
    assert report.samples == {"": 3}
    assert report.skipped == {"No such file or directory": 1}
    assert report.first_skipped[0].endswith("none.jpg: No such file or directory")
    items = samples(tmp_path / "out")
    assert [item.image_bytes for item in items] == images
    assert [item.captions for item in items] == [['"cat", 0', "a long\nline"], ['"cat", 1'], ['"cat", 2', "b"]]
    assert [item.meta["label"] for item in items] == [5, 6, 7]
    with pytest.raises(UserError, match=r"no column title; it has path, short, long, class"):
        pack_table(table, tmp_path / "two", image_column="path", how=How(workers=1))
    with pytest.raises(UserError, match="row 1 has label"):
        pack_table(table, tmp_path / "two", label_column="short", **options)
    assert not (tmp_path / "two").exists()


def test_parquet_lists_are_several_captions(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg")
    table = write_table(tmp_path / "t.parquet", [{"filepath": "a.jpg", "title": ["x", "y"]}])
    pack_table(table, tmp_path / "out", how=How(workers=1))
    assert samples(tmp_path / "out")[0].captions == ["x", "y"]


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.xls").write_text("")
    (tmp_path / "t.parquet").write_text("no")
    before = sorted(tmp_path.rglob("*"))
    for call, says in (
        (lambda: pack_folder(tmp_path / "empty", tmp_path / "full"), "already there"),
        (lambda: pack_folder(tmp_path / "empty", tmp_path / "new"), "no pair"),
        (lambda: pack_folder(tmp_path / "none", tmp_path / "new"), "no folder"),
        (lambda: pack_table(tmp_path / "t.xls", tmp_path / "new"), "must end in"),
        (lambda: pack_table(tmp_path / "t.parquet", tmp_path / "new"), "no Parquet"),
        (lambda: pack_table(tmp_path / "t.csv", tmp_path / "new"), "cannot be read"),
        (
            lambda: pack_folder(tmp_path / "empty", tmp_path / "new", how=How(samples_per_shard=0)),
            "samples_per_shard 0",
        ),
        (lambda: How(quality=101), "quality 101"),
        (lambda: How(resize=0), "resize 0"),
        (lambda: How(min_words=2), "add --clean"),
        (lambda: How(clean=True, min_words=3, max_words=2), "no caption fits"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
