"""`pretrain index --check`: what it counts is what was put in, and a page that hostile captions cannot break out of."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pretrain import cli
from pretrain.config import Data
from pretrain.data.checking.inspect import check, missing_numbers, spread_of
from pretrain.data.checking.inspect_page import histogram, page
from pretrain.data.checking.scanning import Scan, Tally, Task
from pretrain.data.shards.index import make_index
from pretrain.data.storage import make
from pretrain.errors import UserError

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)> \" onload='x' & \ud800"


@pytest.fixture
def odd(tmp_path: Path, picture_bytes: Any, tar_writer: Any) -> list[str]:
    """Two shards whose counts are known."""
    (tmp_path / "s").mkdir()
    both = {"txt": b"two words", "json": json.dumps({"caption": "three short words"}).encode()}
    first = {
        "a": {"png": picture_bytes(1, (10, 20)), **both},
        "b": {"jpg": picture_bytes(2, (30, 40), "JPEG"), "txt": b"two words"},
        "c": {"png": picture_bytes(3, (10, 20))},
        "d": {"jpg": b"<html>", "txt": EVIL.encode("utf-8", "replace")},
    }
    second = {
        "a": {"png": picture_bytes(4, (10, 20)), "txt": b"\xff\xfe"},
        "e": {"txt": b"no image"},
    }
    paths = [tar_writer(tmp_path / "s" / "00003.tar", first), tar_writer(tmp_path / "s" / "00007.tar", second)]
    make_index(paths)
    return paths


@pytest.mark.parametrize("workers", [1, 2])
def test_counts(odd: list[str], workers: int) -> None:
    found = check(odd, workers=workers)
    assert (found.shards, found.samples, found.problems) == (2, 6, ())
    assert found.suffix_sets == {"jpg+txt": 2, "png": 1, "png+txt": 1, "json+png+txt": 1, "txt": 1}
    assert found.missing_numbers == (f"3 numbers of {Path(odd[0]).parent}/*.tar: 00004..00006",)
    assert found.captions["count"] == 5
    assert found.captions["samples without"] == 2
    assert found.captions["unreadable: the txt member is not utf-8"] == 1
    assert found.captions["repeated share"] == pytest.approx(0.2)
    assert (found.captions["words"]["least"], found.captions["words"]["median"]) == (2, 2)
    assert found.images["samples without"] == 1
    assert found.images["headers read"] == 5
    assert found.images["formats"] == {"PNG": 3, "JPEG": 1, "unknown": 1}
    assert (found.images["width"]["least"], found.images["width"]["most"]) == (20, 40)
    assert (found.images["height"]["least"], found.images["height"]["most"]) == (10, 30)
    assert (found.images["decoded"], found.images["undecodable"]) == (5, 1)
    assert found.images["undecodable first"][0].startswith("00003.tar/d: the image does not decode")
    assert found.repeated_keys == {"count": 1, "first": ("00007.tar/a",)}


def test_repeats_are_estimated_from_a_part(make_shards: Any) -> None:
    """One hash in two is kept, the same ones in every shard: of 2 x 300 equal keys and captions about half is seen."""
    paths = make_shards([300], folder="one") + make_shards([300], folder="two")
    make_index(paths)
    store = make(Data())
    from pretrain.data.shards.indexing import open_shards

    shards = open_shards(paths, Data(), store)
    scan = Scan(Data(), thin=2, every=3)
    found = [scan(Task(n, shard, True, frozenset(), frozenset()), lambda *_: None) for n, shard in enumerate(shards)]
    assert list(found[0].keys) == list(found[1].keys)
    assert 100 < len(found[0].keys) < 200
    assert list(found[0].texts) == list(found[1].texts)
    assert found[0].tally.sized == 100
    assert found[0].tally.captions == 900


def test_samples_that_are_split(tmp_path: Path, tar_writer: Any, picture_bytes: Any) -> None:
    import io
    import tarfile

    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "b.txt", "a.json", "c.txt", "c.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    make_index([str(path)])
    assert check([str(path)], workers=1).split_samples == 1


def test_gaps() -> None:
    assert list(missing_numbers(["a/0.tar", "a/1.tar", "b/2.tar"])) == []
    assert list(missing_numbers(["a/cc12m-01.tar", "a/cc12m-03.tar", "a/cc12m-09.tar"])) == [
        "6 numbers of a/cc12m-*.tar: 02, 04..08"
    ]
    assert list(missing_numbers(["s3://b/00000-00.tar", "s3://b/00000-01.tar", "s3://b/00002-00.tar"])) == [
        "1 numbers of s3://b/*.tar: 00001"
    ]
    assert list(missing_numbers(["train.tar"])) == []


def test_problems_end_with_2(odd: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["index", *odd, "--check", "--workers", "1"]) == 0
    capsys.readouterr()
    whole = Path(odd[0]).read_bytes()
    Path(odd[0]).write_bytes(whole[:2000])
    Path(odd[1]).write_bytes(b"\x1f\x8b" + b"gzip" * 300)
    assert cli.run(["index", *odd, "--check", "--workers", "1", "--report", f"{tmp_path}/page.html"]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("pretrain index: ")
    assert "things are wrong with the" in said.err
    assert "problems" in said.out
    assert "is compressed" in said.out
    assert "is compressed" in (tmp_path / "page.html").read_text()
    Path(odd[0]).write_bytes(b"\x1f\x8b" + b"gzip" * 300)
    with pytest.raises(UserError, match="none can be read"):
        check(odd, workers=1)


def test_json_and_mistakes(odd: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["index", *odd, "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["suffix_sets"]["jpg+txt"] == 2
    assert cli.run(["index", *odd, "--report", "x.html"]) == 2
    assert "add --check" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report .*page.html: cannot be written"):
        check(odd, report=tmp_path / "file" / "page.html", workers=1)


class Page(HTMLParser):
    """Tags and text of a page; a tag that is not closed in order fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page(odd: list[str], tmp_path: Path, tar_writer: Any, picture_bytes: Any) -> None:
    texts = [f"{EVIL}{n}".encode("utf-8", "replace") for n in range(30)]
    samples = {f"{n}<b>": {"png": picture_bytes(n, (400, 300)), "txt": text} for n, text in enumerate(texts)}
    odd.append(tar_writer(tmp_path / "s" / "<i>0.tar", samples))
    make_index(odd)
    check(odd, report=tmp_path / "page.html", workers=1)
    content = (tmp_path / "page.html").read_bytes()
    assert len(content) < 1_000_000
    shown = Page(content.decode())
    assert not {"script", "i", "b", "link", "iframe"} & set(shown.tags)
    assert 18 <= shown.tags.count("img") <= 24
    assert shown.tags.count("svg") == 5
    assert all(source.startswith("data:image/jpeg;base64,") for source in shown.sources)
    assert "<script>alert(1)</script>" in shown.text, "what the caption says is shown, as text"
    again = tmp_path / "again.html"
    check(odd, report=again, workers=2)
    assert again.read_bytes() == content


def test_page_stays_small() -> None:
    report = {
        "samples": 1,
        "shards": 1,
        "problems": ["p" * 10_000] * 10_000,
        "more": {str(n): "x" * 9999 for n in range(999)},
    }
    assert len(page(report, Tally())) < 1_000_000


def test_figures() -> None:
    from collections import Counter

    counts = Counter({1: 50, 2: 40, 100: 10})
    assert spread_of(counts) == {"least": 1, "5%": 1, "median": 1, "mean": 11.3, "95%": 100, "most": 100}
    assert spread_of(Counter()) == {}
    assert histogram("none", Counter()) == ""
    drawn = histogram("a <b>", Counter({n: n for n in range(1, 11)}))
    assert drawn.count("<rect") == 10
    assert "height=120.0" in drawn
    assert "<b>" not in drawn
    outlier = histogram("long tail", Counter({1: 999, 2: 1, 10**6: 1}))
    assert "to 1e+06" in outlier or "to 1,000,000" in outlier


def test_a_disk_that_fails_is_no_property_of_the_images() -> None:
    from pretrain.data.checking.scanning import Tally, _measure

    class Failing:
        def read(self, place: tuple[int, int]) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        _measure(Failing(), (0, 100), Tally())  # type: ignore[arg-type]
