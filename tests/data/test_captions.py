"""Captions: found, cleaned, drawn by weight, cut to sentences; and how many random numbers that takes."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from pretrain.config import Data, Run, Train
from pretrain.data.images.decode import BadSample
from pretrain.data.texts.captions import MAX_CAPTION, Texts, parse_meta, texts_of
from pretrain.data.texts.sentences import sentences
from pretrain.errors import UserError

KEYS = ("txt", "json:caption", "json:captions")
SAMPLE = {"txt": ["a"], "json:captions": ["a", "b", "c"]}
LONG = "One is here. Two follows! Is three next? Four ends it."


def texts(**knobs: Any) -> Texts:
    return Texts(Data(text_keys=KEYS, **knobs))


def seen(one: Texts, sample: dict[str, list[str]], times: int = 3000) -> dict[str, float]:
    counts = Counter(one.one(sample, random.Random(seed)) for seed in range(times))
    return {text: count / times for text, count in counts.items()}


class Counted(random.Random):
    """Counts its numbers, and gives no others than `.random()`."""

    taken = 0

    def random(self) -> float:
        self.taken += 1
        return super().random()

    def getrandbits(self, k: int) -> int:
        raise AssertionError("only .random() keeps its sequence between versions of Python")


def test_without_weights_every_distinct_caption_is_as_likely() -> None:
    shares = seen(texts(), SAMPLE)
    assert shares.keys() == {"a", "b", "c"}
    assert all(abs(share - 1 / 3) < 0.03 for share in shares.values())


def test_weights_are_of_keys_among_those_present() -> None:
    weighted = texts(text_weights=(3.0, 5.0, 1.0))
    shares = seen(weighted, SAMPLE)
    assert abs(shares["a"] - (0.75 + 0.25 / 3)) < 0.03
    assert abs(shares["b"] - 0.25 / 3) < 0.03
    assert seen(weighted, {"json:captions": ["x"]}) == {"x": 1.0}
    assert abs(seen(weighted, SAMPLE | {"json:caption": ["d"]})["d"] - 5 / 9) < 0.03


def test_a_weight_of_nothing_gives_nothing() -> None:
    weighted = texts(text_weights=(0.0, 1.0, 1.0))
    assert "only" not in seen(weighted, {"txt": ["only"], "json:caption": ["other"]}, 100)
    with pytest.raises(BadSample, match="no caption"):
        weighted.one({"txt": ["only"]}, random.Random(0))
    with pytest.raises(BadSample, match="no caption"):
        weighted.many({"txt": ["only"]}, 2, random.Random(0))
    assert weighted.available({"txt": ["only"], "json:caption": ["other"]}, 4) == 1


@pytest.mark.parametrize("knobs", [{}, {"text_weights": (1.0, 2.0, 3.0)}, {"sentences": 2},
                                   {"text_weights": (1.0, 0.0, 3.0), "sentences": 1}])  # fmt: skip
@pytest.mark.parametrize("sample", [{"txt": ["a"]}, SAMPLE, {"json:captions": [LONG] * 3 + ["b"]}, {}])
def test_a_caption_takes_one_random_number_and_many_take_their_count(knobs: Any, sample: Any) -> None:
    """Otherwise the crop that is drawn next would depend on what texts its sample has."""
    rng, used = Counted(7), texts(**knobs)
    if sample:
        used.one(sample, rng)
    else:
        with pytest.raises(BadSample):
            used.one(sample, rng)
    assert rng.taken == 1
    if sample:
        used.many(sample, 5, rng)
        assert rng.taken == 6


def test_a_caption_as_before_there_were_knobs() -> None:
    for seed in range(50):
        expected = ["a", "b", "c"][int(random.Random(seed).random() * 3)]
        assert texts().one(SAMPLE, random.Random(seed)) == expected


def test_many_are_different_as_far_as_they_go_and_then_repeat_in_turn() -> None:
    firsts: Counter[str] = Counter()
    for seed in range(600):
        two, five = (texts().many(SAMPLE, count, random.Random(seed)) for count in (2, 5))
        assert len(set(two)) == 2
        assert set(five[:3]) == {"a", "b", "c"}
        assert five[3:] == five[:2]
        firsts[five[0]] += 1
    assert all(150 < count < 250 for count in firsts.values())
    assert [texts().available(SAMPLE, count) for count in (2, 3, 5)] == [2, 3, 3]


def test_sentences_are_neighbours_each_as_likely() -> None:
    shares = seen(texts(sentences=2), {"txt": [LONG]})
    assert shares.keys() == {"One is here. Two follows!", "Two follows! Is three next?", "Is three next? Four ends it."}
    assert all(abs(share - 1 / 3) < 0.03 for share in shares.values())
    assert seen(texts(sentences=4), {"txt": [LONG]}, 20) == {LONG: 1.0}
    assert set(texts(sentences=1).many({"txt": [LONG]}, 3, random.Random(0))) <= set(sentences(LONG))


def test_what_is_drawn_of_captions_and_sentences_is_independent() -> None:
    for weights in ((), (1.0, 1.0, 1.0)):
        shares = seen(texts(sentences=1, text_weights=weights), {"txt": ["Aa. Bb."], "json:caption": ["Cc. Dd."]})
        assert all(abs(shares[text] - 0.25) < 0.03 for text in ("Aa.", "Bb.", "Cc.", "Dd."))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Smith paid 3.5 dollars. He left.", ["Dr. Smith paid 3.5 dollars.", "He left."]),
        (
            "Fruit, e.g. apples. J. R. Smith of the U.S. Navy ate.",
            ["Fruit, e.g. apples.", "J. R. Smith of the U.S. Navy ate."],
        ),
        ("lower case. it goes on... and on?! yes", ["lower case.", "it goes on...", "and on?!", "yes"]),
        ('He said "stop." Then (he ran.) Home.', ['He said "stop."', "Then (he ran.)", "Home."]),
        ("一只狗。一只猫！真的？是", ["一只狗。", "一只猫！", "真的？", "是"]),
        ("यह एक है। वह दो है।", ["यह एक है।", "वह दो है।"]),
        ("Take no. 5 now. I say no. Five.", ["Take no. 5 now.", "I say no.", "Five."]),
        ("A title\n\nA line\nthat goes on", ["A title", "A line\nthat goes on"]),
        ("img.0001.jpg", ["img.0001.jpg"]),
        ("", []),
        (". . .", [".", ".", "."]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@pytest.mark.parametrize("piece", [".", "!)", "\n", "\n ", "a.", "。", ".'", "A. ", "x."])
def test_sentences_of_odd_texts_lose_no_letters(piece: str) -> None:
    text = piece * (MAX_CAPTION // len(piece))
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def found(members: dict[str, bytes], meta: Any = None, columns: Any = None) -> dict[str, list[str]]:
    return texts_of(members, meta or {}, (*KEYS, "parquet:alt"), columns)


def test_texts_come_in_the_order_of_the_keys() -> None:
    meta = {"captions": ["b", " ", None, "c"], "caption": "d"}
    assert list(found({"txt": b" a\n"}, meta, {"alt": "e"}).items()) == [
        ("txt", ["a"]), ("json:caption", ["d"]), ("json:captions", ["b", "c"]), ("parquet:alt", ["e"])]  # fmt: skip
    assert found({}, {"caption": None, "captions": []}, {"alt": None}) == {}


@pytest.mark.parametrize("member", [b"", b" \n\t ", "\ufeff".encode(), b"\x00\x01\x7f", "\u3000\u2028".encode()])
def test_blank_texts_are_none(member: bytes) -> None:
    assert found({"txt": member}) == {}


def test_control_characters_go_and_long_texts_are_cut() -> None:
    assert found({"txt": b"a\x00 cat\x1b on\ta\nmat"}) == {"txt": ["a cat on\ta\nmat"]}
    assert len(found({"txt": b"word " * 210_000})["txt"][0]) == MAX_CAPTION
    assert found({"txt": "naïve 🙂 ﬁ e\u0301".encode()}) == {"txt": ["naïve 🙂 ﬁ e\u0301"]}, "nothing else is touched"


@pytest.mark.parametrize(
    ("members", "meta", "columns", "reason"),
    [
        ({"txt": b"caf\xe9"}, {}, {}, "the txt member is not utf-8"),
        ({}, {"caption": 7}, {}, "the json field 'caption' is neither a string"),
        ({}, {"captions": ["a", 7]}, {}, "the json field 'captions' is neither a string"),
        ({}, {}, {"alt": 1.5}, "the parquet field 'alt' is neither a string"),
        ({}, json.loads('{"caption": "half \\ud83d"}'), {}, "half a surrogate pair"),
    ],
)
def test_undecodable_texts_are_bad_samples(members: Any, meta: Any, columns: Any, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        found(members, meta, columns)


@pytest.mark.parametrize("key", ["jsn:caption", ":caption", "table:a:b"])
def test_a_key_of_no_known_kind_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=r"data\.text_keys \['.*'\] must be a member's extension"):
        Run(data=Data(train=("synthetic:1024",), text_keys=("txt", key)), train=Train(samples=1))


@pytest.mark.parametrize("member", [b"{", b"\xff", b"[1]", b'"a"', b"[" * 100_000, b"9" * 5000])
def test_json_that_is_no_mapping_is_a_bad_sample(member: bytes) -> None:
    with pytest.raises(BadSample, match="the json member"):
        parse_meta(member)
