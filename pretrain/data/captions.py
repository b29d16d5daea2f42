"""Which texts a sample carries, and which of them a training step uses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from typing import Any

from pretrain.data.decode import BadSample

MAX_TEXT_BYTES = 1 << 20
"""Larger text or json members are not read."""
MAX_CAPTION = 10_000
"""Characters kept of a caption; no tokenizer's context reaches further."""


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


def texts_of(members: Mapping[str, bytes], meta: Mapping[str, Any], text_keys: Iterable[str]) -> dict[str, list[str]]:
    """The captions of a sample under the entry of `text_keys` that holds them, without blank ones.

    Args:
        members: extension -> content.
        meta: the parsed json member.
        text_keys: an extension, or 'json:FIELD' whose value is a string or a list of them.

    Raises:
        BadSample: a text member is not utf-8, or a json field holds something else.
    """
    found: dict[str, list[str]] = {}
    for key in text_keys:
        if key.startswith("json:"):
            texts = _of_field(meta, key.removeprefix("json:"))
        else:
            texts = [_decoded(key, members[key])] if key in members else []
        texts = [text[:MAX_CAPTION] for text in map(str.strip, texts) if text]
        if texts:
            found[key] = texts
    return found


def captions_of(members: Mapping[str, bytes], meta: Mapping[str, Any], text_keys: Iterable[str]) -> list[str]:
    """Every caption of a sample, each once, in the order of `text_keys`; otherwise as `texts_of`."""
    return list(dict.fromkeys(text for texts in texts_of(members, meta, text_keys).values() for text in texts))


def choose(captions: list[str], rng: random.Random) -> str:
    """One caption, each as likely. BadSample: there is none."""
    if not captions:
        raise BadSample("the sample has no caption")
    return captions[int(rng.random() * len(captions))]


def _of_field(meta: Mapping[str, Any], field: str) -> list[str]:
    value = meta.get(field)
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise BadSample(f"the json field {field!r} is neither a string nor a list of strings")
    return texts


def _decoded(key: str, member: bytes) -> str:
    try:
        return member.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample(f"the {key} member is not utf-8") from None
