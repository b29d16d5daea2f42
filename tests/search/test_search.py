"""What is found: exactly, in blocks, by faiss; sets; and what a user is told."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import cli, errors
from pretrain.errors import UserError
from pretrain.evaluate.base.sources import open_source
from pretrain.search import approximate, exact, store
from pretrain.search.index import Index, open_index
from pretrain.search.page import page
from pretrain.search.query import Query, queries, vectors
from pretrain.search.search import search


@pytest.fixture
def whole_numbers(tmp_path: Path) -> tuple[Index, np.ndarray]:
    """[400, 8] features of small whole numbers, so that scores are exact and many are equal, in parts of any size."""
    rng = np.random.default_rng(0)
    features = rng.integers(-2, 3, (400, 8)).astype(np.float16)
    cuts = [0, 1, 130, 130, 399, 400]
    facts = {"samples": 1, "path": "a.tar"}
    for n, (start, stop) in enumerate(itertools.pairwise(cuts)):
        entries = [{"key": f"a/{row}", "sample": row - start, "captions": []} for row in range(start, stop)]
        store.write_part(tmp_path, 0, n, {"image": features[start:stop]}, {"image": entries}, [])
    model = {"fingerprint": "x"}
    meta = {"format": store.FORMAT, "towers": ["image"], "dtype": "fp16", "dimensions": 8, "shards": [facts] * 5}
    store.write_meta(tmp_path, meta | {"model": model}, [])
    return open_index(tmp_path), features.astype(np.float32)


@pytest.mark.parametrize("rows", [1, 7, 1 << 15])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_exact_search_sorts_everything(
    whole_numbers: tuple[Index, np.ndarray], rows: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal scores come in the order of the rows, whatever the blocks."""
    monkeypatch.setattr(exact, "QUERIES", 2)
    index, features = whole_numbers
    asked = np.random.default_rng(1).integers(-2, 3, (5, 8)).astype(np.float32)
    scores, found = exact.search(index, torch.from_numpy(asked), k, rows)
    wanted = asked @ features.T
    order = np.argsort(-wanted, axis=1, kind="stable")[:, :k]
    assert np.array_equal(found.numpy(), order)
    assert np.array_equal(scores.numpy(), np.take_along_axis(wanted, order, 1))
    assert [index.entry(int(row)).key for row in order[0][:3]] == [f"a/{row}" for row in order[0][:3]]


def test_faiss_finds_the_same(whole_numbers: tuple[Index, np.ndarray]) -> None:
    pytest.importorskip("faiss")
    index, _ = whole_numbers
    asked = torch.randn(6, 8)  # no two scores are equal but those of equal rows
    wanted, _ = exact.search(index, asked, 5)
    flat, _ = approximate.search(index, asked, 5)
    assert torch.allclose(flat, wanted, atol=1e-4)
    parted, rows = approximate.search(index, asked, 5, lists=4)  # all 4 are looked into
    assert torch.allclose(parted, wanted, atol=1e-4)
    again, same = approximate.search(index, asked, 5, lists=4)
    assert (again.tolist(), same.tolist()) == (parted.tolist(), rows.tolist())
    (kept,) = index.folder.glob("faiss-image-*.index")
    kept.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        approximate.search(index, asked, 5, lists=4)


def test_sets_are_sums_of_mean_cosines(made: Any, features: Path, tmp_path: Path) -> None:
    """Every score, from the definition: mean over a set's members, included ones added, excluded ones taken away."""
    (tmp_path / "warm.txt").write_text("a red picture\n\nan orange picture\n")
    asked = Query("a picture", None, (f"@{tmp_path}/warm.txt",), ("a green picture", "grey"))
    opened = open_source(made.run, None, torch.device("cpu"))

    def cosines(text: str) -> np.ndarray:
        with torch.inference_mode():
            feature = opened.encoder.encode_text(opened.tokenize([text]))[0].numpy()
        return (
            np.concatenate([np.load(path).astype(np.float32) for path in sorted(features.glob("*.image.npy"))])
            @ feature
        )

    warm = (cosines("a red picture") + cosines("an orange picture")) / 2
    wanted = cosines("a picture") + warm - cosines("a green picture") - cosines("grey")
    found = search(features, [asked], 25).answers[0].hits
    order = np.argsort(-wanted, kind="stable")
    assert np.allclose([hit.score for hit in found], wanted[order], atol=1e-5)
    assert {hit.key for hit in found} == {
        f"0000{n}.tar/0000{n}0000{m}" for n in range(5) for m in range(6 if n < 4 else 1)
    }


def test_a_picture_finds_itself_and_a_caption_itself(made: Any, features: Path) -> None:
    found = search(features, queries([], [str(made.pictures / "013.png")], [], []), 1, with_pictures=True)
    (answer,) = found.answers
    assert answer.hits[0].key == "00002.tar/0000200001"
    assert answer.hits[0].score == pytest.approx(1.0, abs=2e-3)
    assert answer.hits[0].picture is not None
    assert answer.picture == answer.hits[0].picture
    said = search(features, queries(["a green picture, number 13"], [], [], []), 1, tower="text").answers[0].hits[0]
    assert said.texts == ["a green picture, number 13"]


def test_the_page_escapes_and_holds_the_pictures(features: Path) -> None:
    found = search(features, [Query("<b>bold</b>", exclude=("<i>",))], 25, with_pictures=True)
    text = page(found)
    assert text.count("data:image/jpeg;base64,") == 25
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;b&gt;bold&lt;/b&gt; \\ &lt;i&gt;" in text


def test_pictures_of_a_shard_that_is_gone_or_replaced(made: Any, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(Path(made.shards).parent, shards)
    made.embed(tmp_path / "out", shards=(f"{shards}/*.tar",))
    (shards / "00000.tar").unlink()
    shutil.copy(shards / "00004.tar", shards / "00001.tar")
    hits = search(tmp_path / "out", [Query("red")], 25, with_pictures=True).answers[0].hits
    why = {hit.key[:5]: hit.why_none for hit in hits if hit.picture is None}
    assert set(why) == {"00000", "00001"}
    assert "was replaced since it was embedded" in str(why["00001"])


def test_the_command(made: Any, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", str(features), "--text", "red", "--text", "blue", "--include", "a picture", "-k", "3"]
    kept = ["--html", str(tmp_path / "page.html"), "--into", str(tmp_path)]
    assert cli.run([*words, *kept, "--json"]) == errors.DONE
    told = json.loads(capsys.readouterr().out)
    assert [answer["query"] for answer in told["answers"]] == ["red ∩ a picture", "blue ∩ a picture"]
    assert [len(answer["hits"]) for answer in told["answers"]] == [3, 3]
    assert (told["rows"], told["missing_shards"]) == (25, 0)
    stored = json.loads((tmp_path / "searches.json").read_text())
    assert stored["answers"][1]["hits"][2]["picture"].startswith("data:image/jpeg;base64,")
    assert "red ∩ a picture" in (tmp_path / "page.html").read_text()
    assert cli.run(words) == errors.DONE
    assert told["answers"][0]["hits"][0]["key"] in capsys.readouterr().out


def test_what_is_not_finished_is_searched_and_told(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(features, out)
    (out / "part-0000-0001.json").unlink()
    found = search(out, [Query("red")], 25)
    assert (found.rows, found.missing_shards, len(found.answers[0].hits)) == (19, 1, 19)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text", "a", "-k", "0"], "-k 0 must be at least 1"),
        (["--exclude", "a"], "nothing is asked for: give --text, --image or --include"),
        (["--text", "a", "--tower", "sound"], "sound"),
        (["--image", "nowhere.png"], "--image nowhere.png: cannot be used"),
        (["--include", "@nowhere.txt"], "set @nowhere.txt: cannot be read"),
        (["--text", " "], "set ' ' is empty"),
        (["--text", "a", "--model", "other"], "is not the model that embedded"),
        (["--text", "a", "--model", "nowhere"], "was embedded by nowhere: "),
        (["--text", "a", "--into", "nowhere"], "--into nowhere is no folder"),
    ],
)
def test_mistakes_are_told_in_a_line(
    made: Any, features: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(made.run.parent / "other") if word == "other" else word for word in words]
    assert cli.run(["search", str(features), *words]) == errors.USER_ERROR
    said = capsys.readouterr()
    assert says in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_an_empty_or_foreign_folder(features: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no features"):
        search(tmp_path, [Query("a")])
    shutil.copy(features / "meta.json", tmp_path)
    with pytest.raises(UserError, match="holds no image features"):
        search(tmp_path, [Query("a")])
    meta = json.loads((tmp_path / "meta.json").read_text()) | {"towers": ["text"]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"--tower image: .* holds features of text only"):
        search(tmp_path, [Query("a")], tower="image")


def test_the_vector_of_a_text_alone_is_its_feature(made: Any) -> None:
    opened = open_source(made.run, None, torch.device("cpu"))
    with torch.inference_mode():
        own = opened.encoder.encode_text(opened.tokenize(["a red picture"]))
        assert torch.equal(vectors([Query("a red picture")], opened), own)
