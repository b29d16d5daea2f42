"""Captions cleaned: what goes, what must stay, and what is counted."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest

from pretrain.data.texts.cleaning import Cleaning, cleaned

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467, \u0915\u094d\u200d\u0937: joiners"


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a cat &amp; a dog", "a cat & a dog"),
        ("&amp;amp;lt;3", "<3"),
        ("&lt;b&gt;bold&lt;/b&gt; move", "bold move"),
        ("<p class='x'>one<br/>two</p><!-- three\n -->", "one two"),
        ("<script >x</script>", "x"),
        ("I <3 this, 1 < 2 > 0, a <b and c", "I <3 this, 1 < 2 > 0, a <b and c"),
        ("\ttwo\n\n lines\u00a0\u3000here ", "two lines here"),
        ("bell\x07 nul\0 soft\u00adhyphen \u202eright\u202c \ufeffmark", "bell nul softhyphen right mark"),
        ("lone \ud800 surrogate", "lone surrogate"),
        (FAMILY, FAMILY),
        ("\u732b\u304c\u5ea7\u308b", "\u732b\u304c\u5ea7\u308b"),
        ("&nbsp; <br>", ""),
    ],
)  # fmt: skip
def test_cleaned(dirty: str, clean: str) -> None:
    assert cleaned(dirty) == clean
    assert cleaned(clean) == clean, "what is clean stays"


def test_unicode_is_composed() -> None:
    changed = Counter[str]()
    assert cleaned("cafe\u0301", changed) == "café"
    assert changed == {"unicode": 1}
    assert unicodedata.is_normalized("NFC", cleaned("e\u0301 &#x65;&#x301;"))


def test_drops_are_counted_by_reason() -> None:
    changed = Counter[str]()
    texts = ["a b", "a  b", "&lt;br&gt;", "one", "1 2 3 4", "c d"]
    assert Cleaning(min_words=2, max_words=3)(texts, changed) == ["a b", "c d"]
    assert changed == {
        "spaces": 2,
        "entities": 1,
        "tags": 1,
        "dropped: repeated": 1,
        "dropped: empty": 1,
        "dropped: too few words": 1,
        "dropped: too many words": 1,
    }
