"""The offset index against the standard library's tar reader and against webdataset; what it refuses and ignores."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.checking.inspect import check
from pretrain.data.patterns import braces
from pretrain.data.shards import indexing, tar
from pretrain.data.shards.facts import Shard, ShardIndex
from pretrain.data.shards.index import expand, fingerprint, make_index
from pretrain.data.shards.reader import ShardSource
from pretrain.errors import UserError


def walk(path: Path) -> tar.Contents:
    raw = path.read_bytes()
    return tar.contents(str(path), lambda offset, size: raw[offset : offset + size], len(raw))


def open_shards(names: list[str], index_dir: str | None = None, start: int = 0) -> list[Shard]:
    data = Data(index_dir=index_dir)
    return indexing.open_shards(names, data, storage.make(data), start)


def build(path: Path) -> ShardIndex:
    return indexing.build(str(path), "unused", storage.make(Data()))[1]


LONG = "folder/" * 30 + "ünïcode-" * 12


def by_library(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as file:
        return [(m.name, m.offset_data, m.size) for m in file if m.isreg() and not m.issparse()]


def add(file: tarfile.TarFile, name: str, content: bytes = b"x", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content) if fields.get("type", tarfile.REGTYPE) == tarfile.REGTYPE else 0
    for field, value in fields.items():
        setattr(info, field, value)
    file.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_as_the_library_sees_them(tmp_path: Path, format: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as file:
        add(file, "plain.jpg", b"a" * 1000)
        add(file, "empty.txt", b"")
        add(file, "exact.bin", b"b" * 512)
        if format != tarfile.USTAR_FORMAT:
            add(file, LONG + ".txt", b"long", mtime=1234.5)  # pax writes a record of its own for a fractional time
        add(file, "dir", type=tarfile.DIRTYPE)
        add(file, "link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(file, "hard.jpg", type=tarfile.LNKTYPE, linkname="plain.jpg")
        add(file, "device.jpg", type=tarfile.CHRTYPE)
        add(file, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(file, "../outside.jpg", b"c" * 3)
        add(file, "/absolute.jpg", b"d" * 4)
    found = walk(path).members
    assert [(m.name, m.offset, m.size) for m in found] == by_library(path)
    assert len(found) == (5 if format == tarfile.USTAR_FORMAT else 6)


def test_pax_sizes_and_sparse_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        add(file, "sparse.jpg", b"e" * 700, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        add(file, "after.jpg", b"f" * 600, pax_headers={"size": "600"})
    assert [(m.name, m.size) for m in walk(path).members] == [("after.jpg", 600)]


def test_nothing_is_extracted_and_links_are_no_samples(tmp_path: Path, picture_bytes: Callable[..., bytes]) -> None:
    place = tmp_path / "inner"
    place.mkdir()
    with tarfile.open(place / "a.tar", "w") as file:
        add(file, "../../evil.png", picture_bytes(0))
        add(file, "../../evil.txt", b"a caption")
        add(file, "secret.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    source = ShardSource([str(place / "a.tar")], Data())
    assert len(source) == 1
    assert source.sample(0).captions == ["a caption"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "a.tar.index", "inner"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b" + b"\x08" * 2000, r"compressed.*gunzip"),
        (b"\x28\xb5\x2f\xfd" + b"\x08" * 20, r"compressed.*unzstd"),
        (b"<html>not found</html>" * 100, "no tar header"),
        (b"<html>not found</html>", "no tar header"),
    ],
)
def test_files_that_are_no_tars_are_errors(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.tar: .*{says}") as caught:
        open_shards([str(path)])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.index"))


def test_keys_as_webdataset_groups_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name in ("x/a.jpg", "x/a.txt", "b.SEG.PNG", "b.txt", "c.tar.gz"):
            add(file, name, name.encode())
    built = build(path)
    ours = {
        key: {ext: path.read_bytes()[at : at + size] for ext, (at, size) in built.members(n).items()}
        for n, key in enumerate(built.names)
    }
    theirs = {
        item["__key__"]: {k: v for k, v in item.items() if not k.startswith("__")}
        for item in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    }
    assert ours == theirs
    assert set(ours["b"]) == {"seg.png", "txt"}


def test_members_need_not_be_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name in ("a.jpg", "b.jpg", "a.txt"):
            add(file, name)
    built = build(path)
    assert built.names == ["a", "b"]
    assert set(built.members(0)) == {"jpg", "txt"}


def test_index_is_kept_and_made_again_when_the_shard_changes(make_shards: Any) -> None:
    paths = make_shards([3, 2])
    first = open_shards(paths)
    stored = [Path(shard.index_path).stat().st_mtime_ns for shard in first]
    assert open_shards(paths) == first
    assert [Path(shard.index_path).stat().st_mtime_ns for shard in first] == stored
    os.utime(paths[0], ns=(1, 1))
    assert open_shards(paths) == [replace(first[0], version="1"), first[1]]
    Path(first[1].index_path).write_bytes(Path(first[1].index_path).read_bytes()[:-1])
    assert open_shards(paths)[1] == first[1]


def test_index_dir(make_shards: Any, tmp_path: Path) -> None:
    paths = make_shards([2], folder="a") + make_shards([3], folder="b")
    shards = open_shards(paths, str(tmp_path / "indexes"))
    assert [shard.samples for shard in shards] == [2, 3], "same file names in two folders do not collide"
    assert len(list((tmp_path / "indexes").iterdir())) == 2
    assert not list((tmp_path / "a").glob("*.index"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.index_dir"):
        open_shards(paths, str(tmp_path / "file" / "below"))


def test_many_build_at_once(make_shards: Any) -> None:
    paths = make_shards([4, 4, 4])
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda start: open_shards(paths, start=start), range(6)))
    assert all(shards == found[0] for shards in found)
    assert not [name for name in os.listdir(Path(paths[0]).parent) if name.endswith(".tmp")]


def test_fingerprint_sees_content_and_not_time_or_place(make_shards: Any, tmp_path: Path) -> None:
    paths, copies = make_shards([3, 2], folder="a"), make_shards([3, 2], folder="b")
    os.utime(copies[0], ns=(1, 1))
    before = fingerprint(open_shards(paths))
    assert fingerprint(open_shards(copies)) == before
    assert fingerprint(open_shards(paths[::-1])) != before
    raw = bytearray(Path(copies[0]).read_bytes())
    at = raw.index(b"caption 1 first")
    raw[at : at + 7] = b"CAPTION"
    Path(copies[0]).write_bytes(raw)
    assert fingerprint(open_shards(copies)) != before, "same sizes, other text"


def test_a_shard_that_changes_in_use_is_refused(make_shards: Any) -> None:
    paths = make_shards([2])
    source = ShardSource(paths, Data())
    os.utime(paths[0], ns=(1, 1))
    with pytest.raises(UserError, match="changed while it was in use"):
        source.sample(0)


def test_expand(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar", "b.tar.index"):
        (tmp_path / name).write_text("")
    names = lambda *patterns: [Path(p).name for p in expand([f"{tmp_path}/{p}" for p in patterns])]  # noqa: E731
    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("b*", "a-*.tar") == ["b.tar", "a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{b,a-10}.tar") == ["b.tar", "a-10.tar"]
    assert list(braces("{1..2}{x,y}")) == ["1x", "1y", "2x", "2y"]
    assert list(braces("{9..11}")) == ["9", "10", "11"]
    for pattern, says in (("c*.tar", "names no file"), ("a-{07..10}.tar", r"1 of 4 .*a-07\.tar"), ("c.tar", "1 of 1")):
        with pytest.raises(UserError, match=f"data.eval: .*{says}"):
            expand([f"{tmp_path}/{pattern}"], "data.eval")
    with pytest.raises(UserError, match="twice"):
        expand([f"{tmp_path}/b.tar", f"{tmp_path}/b*.tar"])


def test_make_index_builds_then_checks(make_shards: Any) -> None:
    paths = make_shards([3, 2])
    fresh = check(paths, decode=0, workers=1)
    assert (fresh.problems, fresh.unindexed) == ((), 2), "shards that no run has met are no mistake"
    built = make_index(paths)
    assert (built.shards, built.samples, built.built, built.problems) == (2, 5, 2, ())
    assert built.members == {"png": 5, "txt": 5, "json": 5}
    checked = check(paths, decode=0, workers=1)
    assert (checked.problems, checked.unindexed, checked.fingerprint) == ((), 0, built.fingerprint)
    stat = os.stat(paths[1])
    raw = bytearray(Path(paths[1]).read_bytes())
    raw[raw.index(b"caption 4") : raw.index(b"caption 4") + 3] = b"CAP"
    Path(paths[1]).write_bytes(raw)
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert check(paths, decode=0, workers=1).problems == (
        f"{paths[1]}: differs from its index, though size and time are the same",
    )


def test_make_index_tells_of_damage(make_shards: Any) -> None:
    paths = make_shards([3, 2])
    raw = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(raw[: raw.index(b"000004.png\0") + 600])
    for found in (make_index(paths), check(paths, decode=0, workers=1)):
        assert found.samples == 4
        assert [line.partition(": ")[0] for line in found.problems] == [paths[1]]
        assert "is cut short" in found.problems[0]
