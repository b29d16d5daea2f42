"""Text edits that make further views of a caption: small functions (words, strength, random numbers) -> words.

`data.text_edits` names them in their order, 'NAME=STRENGTH' each. They are pure functions of the text and the random
numbers, take words (what spaces separate), keep at least one of them, and at strength 0 change nothing. Only
`.random()` of a generator is used, whose sequence Python promises. No torch here: rules.py checks the knob with it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError

Words = list[str]
_SPANS, _SPAN_SHARE = 5, 0.05
"""Of CLEAR: spans of a deletion, and a span's share of the text."""
_LISTED = """
a an the this that these those some any each every no nor not only own same such both few more most other all
i me my mine we us our ours you your yours he him his she her hers it its they them their theirs who whom whose
which what am is are was were be been being have has had having do does did doing will would shall should can
could may might must and but or if because as until while of at by for with about against between into through
during before after above below to from up down in out on off over under again further then once here there when
where why how so than too very just also"""
STOPWORDS = frozenset(_LISTED.split())
"""English words without a meaning of their own, in lower case."""


@dataclass(frozen=True)
class Edit:
    """An entry of data.text_edits."""

    name: str
    low: float
    """The strength; of crop the smallest share that is kept."""
    high: float
    """Of crop the largest share that is kept; else as `low`."""
    table: str | None = None
    """Of synonyms: the path of a JSON file {word: [synonyms]}, words in lower case."""


class Edits:
    """All entries of data.text_edits, one after another.

    Raises:
        UserError: an entry or a table of synonyms is no such thing.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        edits = [parse(entry) for entry in entries]
        self._edits = [(edit, _table(edit.table) if edit.table else {}) for edit in edits]

    def __call__(self, text: str, rng: random.Random) -> str:
        """A view of a text, its words separated by one space each; blank only where the text is."""
        words = text.split()
        for edit, table in self._edits if words else []:
            words = synonyms(words, edit.low, rng, table) if edit.table else _apply(edit, words, rng)
        return " ".join(words)


def parse(entry: str) -> Edit:
    """'delete=0.1', 'crop=0.1-0.5', 'synonyms=0.3:table.json' -> the edit. UserError: anything else."""
    name, equals, value = entry.partition("=")
    if name not in NAMES:
        raise UserError(f"data.text_edits {entry!r}: there is no edit {name!r}; there are {', '.join(NAMES)}")
    what, table = ("a share between 0 and 1", None)
    if name == "reorder":
        what = "a whole number of pairs of spans, at most 100"
    elif name == "crop":
        what = "shares within (0, 1] such as 0.1-0.5"
    elif name == "synonyms":
        what = "a share and a table, such as 0.3:synonyms.json"
        value, _, table = value.partition(":")
    low, dash, high = value.partition("-") if name == "crop" else (value, "", "")
    edit = Edit(name, _number(low), _number(high if dash else low), table)
    if not equals or not _allowed(edit):
        raise UserError(f"data.text_edits {entry!r}: {name} takes {what}")
    return edit


def problems(entries: Sequence[str]) -> list[str]:
    """What is wrong with data.text_edits, one line for each entry; tables are read when the run is built."""
    found = []
    for entry in entries:
        try:
            parse(entry)
        except UserError as error:
            found.append(str(error))
    return found


def delete(words: Words, share: float, rng: random.Random) -> Words:
    """Each word goes with a chance of `share`. Source: Wei and Zou 2019, EDA (arXiv:1901.11196)."""
    return _some([word for word in words if rng.random() >= share], words, rng)


def span_delete(words: Words, share: float, rng: random.Random) -> Words:
    """Five spans of neighbouring words go, each of `share` of the text (they may overlap), rounded up or down at
    random. Source: Wu et al. 2020, CLEAR, section 3.2 (arXiv:2012.15466), whose share is 0.05."""
    gone: set[int] = set()
    for _ in range(_SPANS):
        length = min(math.floor(share * len(words) + rng.random()), len(words))
        start = _below(len(words) - length + 1, rng)
        gone.update(range(start, start + length))
    return _some([word for at, word in enumerate(words) if at not in gone], words, rng)


def swap(words: Words, share: float, rng: random.Random) -> Words:
    """As many swaps of two words as `share` of the text, at least one. Source: Wei and Zou 2019 (arXiv:1901.11196)."""
    words = list(words)
    for _ in range(max(1, int(share * len(words))) if share and len(words) > 1 else 0):
        one, other = _below(len(words), rng), _below(len(words) - 1, rng)
        other += other >= one
        words[one], words[other] = words[other], words[one]
    return words


def reorder(words: Words, pairs: float, rng: random.Random) -> Words:
    """So many times two spans, of 5 % of the text each (at least a word), change places.

    Source: Wu et al. 2020, CLEAR, section 3.2 (arXiv:2012.15466), with 5 pairs.
    """
    length = max(1, round(_SPAN_SHARE * len(words)))
    for _ in range(int(pairs) if len(words) >= 2 * length else 0):
        free = len(words) - 2 * length + 1  # where spans start when both are shrunk to nothing
        first, second = sorted((_below(free, rng), _below(free, rng)))
        a, b = slice(first, first + length), slice(second + length, second + 2 * length)
        words = [*words[: a.start], *words[b], *words[a.stop : b.start], *words[a], *words[b.stop :]]
    return words


def stopwords(words: Words, share: float, rng: random.Random) -> Words:
    """Each English word without meaning of its own goes with a chance of `share`.

    Source: Fini et al. 2023, "Improved baselines for vision-language pre-training" (arXiv:2305.08675), with 0.8.
    """
    return _some([word for word in words if not (_bare(word) in STOPWORDS and rng.random() < share)], words, rng)


def synonyms(words: Words, share: float, rng: random.Random, table: Mapping[str, Sequence[str]]) -> Words:
    """Each word of the table becomes one of its synonyms with a chance of `share`; marks around it and a capital stay.

    Source: Wei and Zou 2019 (arXiv:1901.11196); Wu et al. 2020, CLEAR (share 0.3).
    """
    return [_synonym(word, table, rng) if table.get(_bare(word)) and rng.random() < share else word for word in words]


def repeat(words: Words, share: float, rng: random.Random) -> Words:
    """Up to max(2, `share` of the text) different words are said twice, their number drawn evenly from 0 on.

    Source: Wu et al. 2021, ESimCSE, section 3.1 (arXiv:2109.04380), with 0.32; there of subwords.
    """
    most = max(2, int(share * len(words))) if share else 0
    count = min(_below(most + 1, rng), len(words))
    twice = set(_order(len(words), rng)[:count])
    return [word for at, word in enumerate(words) for _ in range(1 + (at in twice))]


def crop(words: Words, low: float, high: float, rng: random.Random) -> Words:
    """A span of the text, its share drawn evenly from [low, high], at least a word.

    Source: Izacard et al. 2021, Contriever, section 3.2 (arXiv:2112.09118), with 0.1-0.5.
    """
    length = max(1, int((low + (high - low) * rng.random()) * len(words)))
    start = _below(len(words) - length + 1, rng)
    return words[start : start + length]


_PLAIN: dict[str, Callable[[Words, float, random.Random], Words]] = {
    "delete": delete,
    "span_delete": span_delete,
    "swap": swap,
    "reorder": reorder,
    "stopwords": stopwords,
    "repeat": repeat,
}
NAMES = (*_PLAIN, "synonyms", "crop")
"""Every edit."""


def _apply(edit: Edit, words: Words, rng: random.Random) -> Words:
    return crop(words, edit.low, edit.high, rng) if edit.name == "crop" else _PLAIN[edit.name](words, edit.low, rng)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # which no rule allows


def _allowed(edit: Edit) -> bool:
    if edit.name == "reorder":
        return 0 <= edit.low <= 100 and edit.low.is_integer()
    if edit.name == "crop":
        return 0 < edit.low <= edit.high <= 1
    return 0 <= edit.low <= 1 and (edit.name != "synonyms" or bool(edit.table))


def _table(path: str) -> dict[str, list[str]]:
    rule = "must be a JSON file {word: [synonyms]}"
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.text_edits: {path} {rule}: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise UserError(f"data.text_edits: {path} {rule}, not a {type(table).__name__}")
    for word, listed in table.items():
        if not isinstance(listed, list) or not all(isinstance(other, str) and other.strip() for other in listed):
            raise UserError(f"data.text_edits: {path} {rule}: {word!r} has {listed!r:.80}")
    return {word.lower(): [" ".join(other.split()) for other in listed] for word, listed in table.items()}


def _some(left: Words, words: Words, rng: random.Random) -> Words:
    """What is left of the words, or any one of them where nothing is."""
    return left or [words[_below(len(words), rng)]]


def _below(count: int, rng: random.Random) -> int:
    return min(int(rng.random() * count), count - 1)


def _order(count: int, rng: random.Random) -> list[int]:
    """range(count), shuffled."""
    luck = [rng.random() for _ in range(count)]
    return sorted(range(count), key=luck.__getitem__)


def _edges(word: str) -> tuple[int, int]:
    """Where a word starts and stops without the marks around it."""
    inside = [at for at, char in enumerate(word) if char.isalnum()]
    return (inside[0], inside[-1] + 1) if inside else (0, len(word))


def _bare(word: str) -> str:
    start, stop = _edges(word)
    return word[start:stop].lower()


def _synonym(word: str, table: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    start, stop = _edges(word)
    known = table[_bare(word)]
    other = known[_below(len(known), rng)]
    other = other[0].upper() + other[1:] if word[start].isupper() else other
    return word[:start] + other + word[stop:]
