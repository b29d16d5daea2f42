"""Which texts a sample carries, and which of them a training step uses."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.config import Data
from pretrain.data.images.decode import BadSample
from pretrain.data.texts.edits import Edits
from pretrain.data.texts.sentences import sentences

MAX_TEXT_BYTES = 1 << 22
"""Larger text or json members are not read."""
MAX_CAPTION = 10_000
"""Characters kept of a caption; no tokenizer's context reaches further."""
_ODD = re.compile(r"[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
"""What no caption means: control characters (those that ftfy, and so CLIP's tokenizer, drops) and lone surrogates."""


class Texts:
    """Captions of a sample -> what is trained on. Pure functions of the texts and the random numbers.

    Args:
        data: text_keys and text_weights, sentences, text_edits.

    Raises:
        UserError: data.text_edits names a table of synonyms that is none.
    """

    def __init__(self, data: Data) -> None:
        self._chances = dict(zip(data.text_keys, data.text_weights, strict=True)) if data.text_weights else None
        self._sentences = data.sentences
        self._edits = Edits(data.text_edits)

    def one(self, texts: Mapping[str, Sequence[str]], rng: random.Random) -> str:
        """A caption for a row: of a key by its weight among those present, then any of its list; else any caption.

        Takes exactly one random number, whatever the sample holds and the knobs say, so that what is drawn next (the
        crop) does not depend on it.

        Args:
            texts: text key -> its captions, in the order of data.text_keys.

        Raises:
            BadSample: there is no caption, or none whose weight is positive.
        """
        luck = rng.random()
        captions = _distinct(texts)
        if self._chances is not None:
            captions, luck = self._of_a_key(texts, luck)
        if not captions:
            raise BadSample("the sample has no caption")
        at, luck = _split(luck, len(captions))
        return self._part(captions[at], luck)

    def many(self, texts: Mapping[str, Sequence[str]], count: int, rng: random.Random) -> list[str]:
        """`count` captions in random order, different ones as far as there are, then the same again from the first.

        Keys whose weight is 0 give none; otherwise weights do not matter here. Takes exactly `count` random numbers.

        Raises:
            BadSample: there is no caption.
        """
        luck = [rng.random() for _ in range(count)]
        left = self._usable(texts)
        if not left:
            raise BadSample("the sample has no caption")
        drawn: list[str] = []
        for chance in luck[: len(left)]:
            at, rest = _split(chance, len(left))
            drawn.append(self._part(left.pop(at), rest))
        return [drawn[n % len(drawn)] for n in range(count)]

    def available(self, texts: Mapping[str, Sequence[str]], count: int) -> int:
        """How many of the captions that `many` gives are different ones of the sample: the row's caption_counts."""
        return min(count, len(self._usable(texts)))

    def edited(self, text: str, rng: random.Random) -> str:
        """A further view of a caption, by data.text_edits; never blank."""
        return self._edits(text, rng)

    def _of_a_key(self, texts: Mapping[str, Sequence[str]], luck: float) -> tuple[list[str], float]:
        """The captions of one key, and what is left of the random number."""
        chances = {key: self._chance(key) for key, listed in texts.items() if listed and self._chance(key) > 0}
        luck *= sum(chances.values())
        for key, chance in chances.items():
            if luck < chance:
                return list(texts[key]), luck / chance
            luck -= chance
        last = next(reversed(chances), None)  # rounding: luck reached the sum of all chances
        return (list(texts[last]), 0.0) if last is not None else ([], 0.0)

    def _usable(self, texts: Mapping[str, Sequence[str]]) -> list[str]:
        return _distinct({key: listed for key, listed in texts.items() if self._chance(key) > 0})

    def _chance(self, key: str) -> float:
        return 1.0 if self._chances is None else self._chances.get(key, 0.0)

    def _part(self, caption: str, luck: float) -> str:
        """Neighbouring sentences of a caption that has more than data.sentences of them."""
        if not self._sentences:
            return caption
        parts = sentences(caption)
        if len(parts) <= self._sentences:
            return caption
        start, _ = _split(luck, len(parts) - self._sentences + 1)
        return " ".join(parts[start : start + self._sentences])


def parse_meta(member: bytes | None) -> dict[str, Any]:
    """The json member as a mapping; empty where there is none. BadSample: it does not parse."""
    if member is None:
        return {}
    try:
        meta = json.loads(member)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the json member does not parse: {error}") from None
    if not isinstance(meta, dict):
        raise BadSample(f"the json member is a {type(meta).__name__}, not a mapping")
    return meta


def texts_of(
    members: Mapping[str, bytes],
    meta: Mapping[str, Any],
    text_keys: Iterable[str],
    columns: Mapping[str, Any] | None = None,
) -> dict[str, list[str]]:
    """The captions of a sample under the entry of `text_keys` that holds them, without blank ones.

    They are stripped, without control characters, and cut to MAX_CAPTION.

    Args:
        members: extension -> content.
        meta: the parsed json member.
        text_keys: an extension, 'json:FIELD' or 'parquet:COLUMN', whose value is a string or a list of them.
        columns: the sample's row of the table beside the shard.

    Raises:
        BadSample: a text is not utf-8, or a field holds something else than text.
    """
    found: dict[str, list[str]] = {}
    for key in text_keys:
        kind, _, name = key.partition(":")
        if name:
            values = (meta if kind == "json" else columns or {}).get(name)
            texts = _listed(values, f"the {kind} field {name!r}")
        else:
            texts = [_decoded(key, members[key])] if key in members else []
        if cleaned := [text for text in map(clean, texts) if text]:
            found[key] = cleaned
    return found


def captions_of(members: Mapping[str, bytes], meta: Mapping[str, Any], text_keys: Iterable[str]) -> list[str]:
    """Every caption of a sample, each once, in the order of `text_keys`; otherwise as `texts_of`."""
    return _distinct(texts_of(members, meta, text_keys))


def clean(text: str) -> str:
    """A text as it is kept: stripped, without control characters, cut to MAX_CAPTION; may be empty.

    Raises:
        BadSample: half a surrogate pair, which no encoding can write, as json's escapes can spell it.
    """
    text = text.strip()[:MAX_CAPTION]
    if _ODD.search(text):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise BadSample("a caption holds half a surrogate pair: it is not unicode text")
        text = _ODD.sub("", text).strip()
    return text


def _distinct(texts: Mapping[str, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(text for listed in texts.values() for text in listed))


def _split(luck: float, count: int) -> tuple[int, float]:
    """One of `count` by a number in [0, 1), and the number in [0, 1) that is left for the next choice.

    53 random bits last for every choice made of them here: a million captions and sentences use 20.
    """
    scaled = luck * count
    at = min(int(scaled), count - 1)
    return at, min(scaled - at, 1 - 2**-53)


def _listed(value: Any, what: str) -> list[str]:
    texts = [text for text in value if text is not None] if isinstance(value, list | tuple) else [value]
    texts = [] if value is None else texts
    if not all(isinstance(text, str) for text in texts):
        raise BadSample(f"{what} is neither a string nor a list of strings")
    return texts


def _decoded(key: str, member: bytes) -> str:
    try:
        return member.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample(f"the {key} member is not utf-8") from None
