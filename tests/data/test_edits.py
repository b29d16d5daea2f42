"""Text edits: what each does to words, never to nothing, the same for the same random numbers."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from pretrain import config
from pretrain.data.texts import edits
from pretrain.data.texts.edits import Edits
from pretrain.errors import UserError

TEXT = "The quick brown fox, of an old forest, jumps over the lazy dog and runs into its warm den at night."
WORDS = TEXT.split()


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "synonyms.json"
    path.write_text(json.dumps({"quick": ["fast", "swift"], "the": ["that"], "dog": ["hound"], "fox": []}))
    return str(path)


def every(table: str, share: str = "0.5") -> list[str]:
    plain = [f"{name}={share}" for name in ("delete", "span_delete", "swap", "stopwords", "repeat")]
    return [*plain, "reorder=3", "crop=0.2-0.6", f"synonyms={share}:{table}"]


def test_every_edit_is_tried_here(table: str) -> None:
    assert {entry.partition("=")[0] for entry in every(table)} == set(edits.NAMES)


@pytest.mark.parametrize("text", ["", "  ", "one", "one two", "the", "。", TEXT, "the of a"])
def test_no_view_is_blank_and_the_same_numbers_give_the_same_view(text: str, table: str) -> None:
    for entry in [*every(table), *every(table, "1")]:
        edit = Edits([entry])
        for seed in range(20):
            view = edit(text, random.Random(seed))
            assert bool(view.strip()) == bool(text.strip()), (entry, seed)
            assert edit(text, random.Random(seed)) == view
    chain = Edits(every(table))
    assert all(chain(text, random.Random(seed)).strip() for seed in range(20)) == bool(text.strip())


def test_strength_nothing_changes_nothing(table: str) -> None:
    entries = [*every(table, "0"), "reorder=0", "crop=1"]
    nothing = Edits([entry for entry in entries if entry not in ("reorder=3", "crop=0.2-0.6")])
    assert all(nothing(TEXT, random.Random(seed)) == TEXT for seed in range(20))
    assert Edits([])(TEXT, random.Random(0)) == TEXT


def test_edits_take_only_random_numbers_that_python_promises() -> None:
    class Promised(random.Random):
        def getrandbits(self, k: int) -> int:
            raise AssertionError("getrandbits was called")

    for entry in every("", "0.5")[:-1]:
        Edits([entry])(TEXT, Promised(1))


def share_left(entry: str, times: int = 400) -> float:
    edit = Edits([entry])
    return sum(len(edit(TEXT, random.Random(seed)).split()) for seed in range(times)) / times / len(WORDS)


def test_delete_leaves_words_in_order_and_as_many_as_it_says() -> None:
    assert abs(share_left("delete=0.3") - 0.7) < 0.02
    view = Edits(["delete=0.3"])(TEXT, random.Random(0)).split()
    places = iter(WORDS)
    assert all(word in places for word in view), "a subsequence"


def test_span_delete_takes_five_spans() -> None:
    """Each word survives five spans of one word out of twenty; the edges are met a little less often."""
    assert abs(share_left("span_delete=0.05") - (1 - 0.05) ** 5) < 0.03
    words = [str(n) for n in range(100)]
    left = edits.span_delete(words, 0.1, random.Random(4))
    gone = [n for n in range(100) if str(n) not in left]
    runs = 1 + sum(after != before + 1 for before, after in itertools.pairwise(gone))
    assert 10 <= len(gone) <= 50
    assert runs <= 5


def test_swap_and_reorder_keep_every_word() -> None:
    for entry in ("swap=0.3", "reorder=5"):
        views = {Edits([entry])(TEXT, random.Random(seed)) for seed in range(20)}
        assert all(Counter(view.split()) == Counter(WORDS) for view in views)
        assert len(views) > 15
    assert edits.swap(["a", "b"], 0.1, random.Random(0)) == ["b", "a"], "at least one swap, of two different words"


def test_reorder_exchanges_two_spans() -> None:
    words = [str(n) for n in range(100)]
    for seed in range(50):
        moved = edits.reorder(words, 1, random.Random(seed))
        places = [at for at, word in enumerate(moved) if word != words[at]]
        assert len(places) in (0, 10)
        assert sorted(moved, key=int) == words


def test_stopwords_go_and_others_stay() -> None:
    view = Edits(["stopwords=1"])(TEXT, random.Random(0))
    assert view == "quick brown fox, old forest, jumps lazy dog runs warm den night."
    assert Edits(["stopwords=1"])("It is the", random.Random(0)) in ("It", "is", "the")
    kept = sum("quick brown fox, of an" in Edits(["stopwords=0.5"])(TEXT, random.Random(seed)) for seed in range(400))
    assert 70 < kept < 130, "both of two stop words stay in a quarter"


def test_synonyms_keep_capitals_and_marks(table: str) -> None:
    view = Edits([f"synonyms=1:{table}"])('"The quick, fox" and dog.', random.Random(0))
    assert view in ('"That fast, fox" and hound.', '"That swift, fox" and hound.')
    seen = Counter(Edits([f"synonyms=0.5:{table}"])("quick", random.Random(seed)) for seed in range(400))
    assert set(seen) == {"quick", "fast", "swift"}
    assert 150 < seen["quick"] < 250


def test_repeat_says_different_words_twice() -> None:
    counts = Counter()
    for seed in range(400):
        view = edits.repeat(WORDS, 0.32, random.Random(seed))
        more = Counter(view) - Counter(WORDS)
        assert set(more.values()) <= {1}, "no word three times"
        assert [word for at, word in enumerate(view) if at == 0 or view[at - 1] != word] == WORDS
        counts[len(view) - len(WORDS)] += 1
    assert set(counts) == set(range(int(0.32 * len(WORDS)) + 1)), "evenly from 0 to the most"
    assert {len(edits.repeat(["a", "b", "c"], 0.1, random.Random(seed))) for seed in range(50)} == {3, 4, 5}


def test_crop_is_a_span_of_the_text() -> None:
    words = [str(n) for n in range(200)]
    lengths = set()
    for seed in range(200):
        view = edits.crop(words, 0.1, 0.5, random.Random(seed))
        assert view == words[int(view[0]) : int(view[-1]) + 1]
        lengths.add(len(view))
    assert min(lengths) >= 20
    assert max(lengths) < 100
    assert len(lengths) > 50
    assert len(Edits(["crop=0.25"])(TEXT, random.Random(0)).split()) == 5


def test_edits_follow_one_another() -> None:
    chain = Edits(["stopwords=1", "crop=0.5"])
    assert len(chain(TEXT, random.Random(0)).split()) == 6


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ("shuffle=0.1", r"no edit 'shuffle'; there are delete, "),
        ("", "no edit ''"),
        ("delete", "a share between 0 and 1"),
        ("delete=", "a share between 0 and 1"),
        ("delete=much", "a share between 0 and 1"),
        ("delete=1.1", "a share between 0 and 1"),
        ("delete=nan", "a share between 0 and 1"),
        ("swap=-0.1", "a share between 0 and 1"),
        ("reorder=1.5", "a whole number"),
        ("reorder=inf", "a whole number"),
        ("reorder=101", "at most 100"),
        ("crop=0", r"shares within \(0, 1\]"),
        ("crop=0.5-0.1", r"shares within \(0, 1\]"),
        ("crop=0.5-", r"shares within \(0, 1\]"),
        ("synonyms=0.3", "and a table"),
        ("synonyms=0.3:", "and a table"),
    ],
)
def test_a_wrong_entry_is_one_line_at_the_start(entry: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        config.Run(data=config.Data(train=("synthetic:1024",), text_edits=(entry,)), train=config.Train(samples=1))
    assert f"data.text_edits {entry!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "rule"),
    [(None, "No such file"), ("{", "Expecting"), ("[1]", "not a list"), ('{"a": "b"}', "'a' has 'b'"),
     ('{"a": ["b", " "]}', "'a' has")],
)  # fmt: skip
def test_a_table_that_is_none_is_one_line(content: str | None, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rule) as caught:
        Edits([f"synonyms=0.5:{path}"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
