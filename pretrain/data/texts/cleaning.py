"""Captions without what web pages left in them: entities, tags, control characters, odd white space, repeats."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_TAGS = (
    "a|abbr|b|big|blockquote|br|center|code|div|em|figcaption|figure|font|h[1-6]|hr|i|img|li|ol|p|pre|q|s|script|small"
    "|span|strike|strong|style|sub|sup|table|tbody|td|th|thead|tr|tt|u|ul|video"
)
_TAG = re.compile(rf"<!--.*?-->|</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE | re.DOTALL)
"""Only tags that HTML has: '<3' and 'a <b and c' are text."""
_UNSEEN = frozenset("\u00ad\u200b\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Soft hyphens, zero-width spaces, byte order marks, direction overrides. Joiners stay: scripts and emoji need them."""
_NESTED = 3
"""How often an entity may have been escaped: '&amp;amp;lt;' is met on real pages."""


def _entities(text: str) -> str:
    for _ in range(_NESTED):
        before, text = text, html.unescape(text)
        if text == before:
            break
    return text


def _tags(text: str) -> str:
    return _TAG.sub(" ", text)


def _controls(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c.isspace() or not (c in _UNSEEN or unicodedata.category(c) in ("Cc", "Cs")))


def _unicode(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _spaces(text: str) -> str:
    return " ".join(text.split())


_STEPS: dict[str, Callable[[str], str]] = {
    "entities": _entities,
    "tags": _tags,
    "controls": _controls,
    "unicode": _unicode,
    "spaces": _spaces,
}
"""In this order: an escaped tag is a tag, and what a tag leaves behind is a space."""


def cleaned(text: str, changed: Counter[str] | None = None) -> str:
    """One caption, cleaned; may be empty.

    Args:
        changed: counts, by step, the captions that the step altered.
    """
    for name, step in _STEPS.items():
        before, text = text, step(text)
        if changed is not None and text != before:
            changed[name] += 1
    return text


@dataclass(frozen=True)
class Cleaning:
    """Cleans the captions of a sample, and drops those that repeat or have too few or too many words."""

    min_words: int | None = None
    max_words: int | None = None

    def __call__(self, texts: Iterable[str], changed: Counter[str]) -> list[str]:
        """What is left of a sample's captions, in order; `changed` counts what was altered and what was dropped."""
        kept = dict[str, None]()
        for text in texts:
            clean = cleaned(text, changed)
            why = self._unfit(clean) or ("dropped: repeated" if clean in kept else None)
            if why is None:
                kept[clean] = None
            else:
                changed[why] += 1
        return list(kept)

    def _unfit(self, text: str) -> str | None:
        words = len(text.split())
        if not words:
            return "dropped: empty"
        if self.min_words is not None and words < self.min_words:
            return "dropped: too few words"
        if self.max_words is not None and words > self.max_words:
            return "dropped: too many words"
        return None
