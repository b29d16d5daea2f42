"""Names of shards: braces, globs, joins, files of names and of weights, local and remote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.patterns import Entry, braces, entries, expand
from pretrain.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a-08.tar, a-09.tar, a-10.tar, b.tar and an index, in the working directory."""
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar", "b.tar.index", "b.tar.x.tmp"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


A = ["a-08.tar", "a-09.tar", "a-10.tar"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{1..2}{x,y}", ["1x", "1y", "2x", "2y"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{09..11}", ["09", "10", "11"]),
        ("x{,-b}.tar", ["x.tar", "x-b.tar"]),
        ("{a}{1..2}", ["{a}1", "{a}2"]),
        ("pipe:cat ${DIR}/{0..1}.tar", ["pipe:cat ${DIR}/0.tar", "pipe:cat ${DIR}/1.tar"]),
        ("{a,b{1..2}}", ["a", "b1", "a", "b2"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert list(braces(pattern)) == names


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["a-{08..10}.tar"], [A]),
        (["b*", "a-*.tar"], [["b.tar"], A]),
        (["{b,a-10}.tar"], [["b.tar", "a-10.tar"]]),
        (["{b,a}*.tar"], [["b.tar", *A]]),
        (["b.tar::a-*.tar"], [["b.tar"], A]),
        (["a-?8.tar"], [["a-08.tar"]]),
    ],
)
def test_local_patterns(patterns: list[str], found: list[list[str]], folder: Path) -> None:
    assert entries(patterns) == [Entry(paths) for paths in found]
    assert expand(patterns) == [path for paths in found for path in paths]


def test_local_names_in_other_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert expand(["~/b.tar", f"file://{folder}/a-08.tar", f"file://{folder}/a-1*.tar"]) == [
        f"{folder}/{name}" for name in ("b.tar", "a-08.tar", "a-10.tar")
    ]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("c*.tar", "names no file"),
        ("a-{07..10}.tar", r"1 of 4 shards .*\(a-07\.tar\)"),
        ("c-{0..9}.tar", r"10 of 10 .*c-0\.tar, c-1\.tar, c-2\.tar, \.\.\."),
        ("b.tar::", "no files"),
        ("@none", "none is no file of shards"),
        ("none.json", "none.json is no file of shards"),
        ("b.tar::b*.tar", "b.tar is named twice"),
    ],
)
def test_names_of_nothing(pattern: str, says: str, folder: Path) -> None:
    with pytest.raises(UserError, match=f"data.eval: .*{says}"):
        expand([pattern], "data.eval")


def test_a_file_of_patterns_is_one_data_set(folder: Path) -> None:
    (folder / "list.txt").write_text("# shards\n\nb.tar  \n  a-{08..09}.tar\r\n")
    (folder / "other").write_text("a-1*.tar\n")
    assert entries(["list.txt", "@other"]) == [Entry(["b.tar", "a-08.tar", "a-09.tar"]), Entry(["a-10.tar"])]
    (folder / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match=r"empty\.txt lists no shards"):
        entries(["empty.txt"])
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"binary\.txt is no UTF-8 text"):
        entries(["binary.txt"])


@pytest.mark.parametrize("name", ["mix.json", "mix.yaml", "mix.yml"])
def test_a_file_of_weights(name: str, folder: Path) -> None:
    (folder / name).write_text(json.dumps({"a-*.tar": 3, "b.tar": 0.5}))
    assert entries([name]) == [Entry(A, 3.0), Entry(["b.tar"], 0.5)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "must map patterns to weights"),
        ("{}", "must map patterns to weights"),
        ('{"b.tar": 0}', "'b.tar' the weight 0; it must be a number above 0"),
        ('{"b.tar": "1"}', "the weight '1'"),
        ('{"b.tar": true}', "the weight True"),
        ('{"b.tar": Infinity}', "the weight inf"),
        ('{"c.tar": 1}', "c.tar"),
    ],
)
def test_weights_that_are_none(text: str, says: str, folder: Path) -> None:
    (folder / "mix.json").write_text(text)
    with pytest.raises(UserError, match=f"^data.train: .*{says}") as error:
        entries(["mix.json"])
    assert "\n" not in str(error.value)


def test_remote_names_are_not_asked_for_one_by_one(folder: Path) -> None:
    assert expand(["s3://bucket/{00..02}.tar::http://host/x.tar?key=1"]) == [
        *(f"s3://bucket/0{n}.tar" for n in range(3)),
        "http://host/x.tar?key=1",
    ]


def test_remote_globs_and_files_of_names() -> None:
    store: Any = storage.make(Data())
    for name in ("x/1.tar", "x/0.tar", "x/0.tar.index", "y.tar"):
        store.write(f"memory://names/{name}", b"")
    tails = lambda found: [os.path.relpath(name, "memory://names") for name in found]  # noqa: E731
    assert tails(expand(["memory://names/x/*"], storage=store)) == ["x/0.tar", "x/1.tar"]
    with pytest.raises(UserError, match="names no file"):
        expand(["memory://names/z/*"], storage=store)
    store.write("memory://names/mix.json", b'{"memory://names/x/*.tar": 2, "memory://names/y.tar": 1}')
    found = entries(["memory://names/mix.json"], store)
    assert [(tails(entry.paths), entry.weight) for entry in found] == [(["x/0.tar", "x/1.tar"], 2.0), (["y.tar"], 1.0)]


def test_pipes_keep_their_colons_and_need_the_flag(tmp_path: Path) -> None:
    pattern = "pipe:perl -e 'A::b' {0..1}::pipe:cat b.tar"
    with pytest.raises(UserError, match=r"--data\.allow-pipe true"):
        entries([pattern])
    store = storage.make(Data(allow_pipe=True, cache_dir=str(tmp_path)))
    assert entries([pattern], store) == [
        Entry(["pipe:perl -e 'A::b' 0", "pipe:perl -e 'A::b' 1"]),
        Entry(["pipe:cat b.tar"]),
    ]


def test_the_synthetic_source_is_no_shard(folder: Path) -> None:
    (folder / "list.txt").write_text("b.tar\nsynthetic:8\n")
    for pattern in ("synthetic:8", "list.txt"):
        with pytest.raises(UserError, match=r"data\.eval: synthetic:8 is no shard"):
            entries([pattern], field="data.eval")
