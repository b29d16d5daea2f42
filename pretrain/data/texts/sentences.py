"""Where a text's sentences end: a rule of punctuation, in any language that has some."""

from __future__ import annotations

import re

_END = re.compile(
    r"""(?<![.!?…؟۔።])(?P<mark>[.!?…؟۔።]+)["'”’»)\]]*(?=\s) # a mark counts where a space follows: 3.5 and a.jpg go on
      | [。！？｡।॥]+["'”’」』）)]*                             # these need none
      | \n[^\S\n]*\n                                         # an empty line ends what stands before it
    """,
    re.VERBOSE,
)
_TITLES_AND_MONTHS = """
mr mrs ms dr prof st jr sr gen col sgt capt lt rev hon gov pres dept est approx ca vs etc fig vol ed eds inc ltd co
corp bros mt ft ave blvd rd sq jan feb mar apr jun jul aug sep sept oct nov dec"""
_SHORT = frozenset(_TITLES_AND_MONTHS.split())
"""Abbreviations that seldom end a sentence, without their dot."""
_COUNTED = frozenset({"no", "nr", "p", "pp", "art", "sec", "ch"})
"""Those that are none unless a number follows: 'no. 5'."""
_LAST_WORD, _NUMBER = re.compile(r"[^\W_]+(?:\.[^\W_]+)*$"), re.compile(r"\s+\d")


def sentences(text: str) -> list[str]:
    """The sentences of a text in order, each with its mark and without the spaces around it.

    Abbreviations (Dr., e.g., U.S., initials) do not end one, so that where one does, two sentences stay together.
    """
    parts, start = [], 0
    for end in _END.finditer(text):
        if end["mark"] != "." or not _abbreviates(text, end.start()):
            parts.append(text[start : end.end()].strip())
            start = end.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _abbreviates(text: str, dot: int) -> bool:
    """Whether the word before a dot is an abbreviation; only the last 32 characters are looked at."""
    word = _LAST_WORD.search(text[max(0, dot - 32) : dot])
    if word is None:
        return False
    said = word[0].lower()
    initial = len(said) == 1 and said.isalpha() and word[0].isupper() and said.isascii()
    return initial or "." in said or said in _SHORT or (said in _COUNTED and bool(_NUMBER.match(text, dot + 1)))
