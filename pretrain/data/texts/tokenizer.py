"""open_clip's tokenizers, with their memory bounded and what they cut off counted."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor

from pretrain.compat import open_clip
from pretrain.errors import UserError

PROBE = (
    "",
    "a photo of a cat.",
    "A Diagram, with PUNCTUATION; and 1234 numbers & <b>html</b> &amp; entities",
    "naïve café, 北京, Привет, emoji 🙂, ligature ﬁ",
    "one very long caption " * 40,
)
_CACHED_WORDS = 100_000
"""About 20 MB per process."""


class Tokenizer:
    """Texts to [B, L] int64 token ids, exactly as open_clip's own tokenizer gives them.

    Args:
        tokenize: an open_clip tokenizer.
        context_length: L.
    """

    def __init__(self, tokenize: Any, context_length: int) -> None:
        self._tokenize, self.context_length = tokenize, context_length
        keepers: tuple[Any, ...] = (tokenize, getattr(tokenize, "tokenizer", None))  # the latter is Hugging Face's
        for keeper in keepers:
            if isinstance(getattr(keeper, "cache", None), dict):
                keeper.cache = _BoundedCache(keeper.cache, _CACHED_WORDS)
        self._pad = int(self._ids([""], context_length)[0, -2])
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(self(list(PROBE)).numpy().tobytes())
        """Of the ids of a fixed list of texts: two tokenizers that differ in use differ here."""

    def __call__(self, texts: list[str]) -> Tensor:
        """[B, L] int64, padded, or cut after L tokens."""
        return self._ids(texts, self.context_length)

    def truncated(self, texts: list[str], tokens: Tensor) -> int:
        """How many of the texts did not fit.

        Args:
            texts: B of them.
            tokens: [B, L] what a call made of them.
        """
        near = (tokens[:, -2:] != self._pad).any(dim=1)
        full = [text for text, is_near in zip(texts, near.tolist(), strict=True) if is_near]
        if not full:
            return 0
        longer, rows = self._ids(full, self.context_length + 1), tokens[near]
        pad = torch.full_like(rows[:, :1], self._pad)
        fitting = (
            [rows, pad],
            [rows[:, :-1], pad, rows[:, -1:]],
            [pad, rows],
        )  # one more pad: behind, inside, in front
        fits = torch.stack([(torch.cat(form, dim=1) == longer).all(dim=1) for form in fitting])
        return len(full) - int(fits.any(dim=0).sum())

    def _ids(self, texts: list[str], context_length: int) -> Tensor:
        ids: Tensor = self._tokenize(texts, context_length=context_length)
        return ids.to(torch.int64)


def build(model_name: str, context_length: int | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        model_name: an open_clip model's name, 'hf-hub:ORG/REPO' or 'local-dir:FOLDER'.
        context_length: tokens of a text; default: the model's.

    Raises:
        UserError: there is no such model, its tokenizer cannot be fetched, or it cuts texts at random.
    """
    if ":" not in model_name and open_clip.get_model_config(model_name) is None:
        raise UserError(f"model.name {model_name!r} is no open_clip model; open_clip.list_models() names them")
    try:
        made = open_clip.get_tokenizer(model_name, context_length=context_length)
    except (OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.name {model_name!r}: its tokenizer cannot be loaded, fetch it first: {reason}"
        ) from None
    if getattr(made, "reduction_fn", None) is not None:
        raise UserError(f"model.name {model_name!r}: its tokenizer drops words at random; remove reduction_mask")
    return Tokenizer(made, made.context_length)


class _BoundedCache(dict[str, str]):
    """The word cache of a BPE written in Python, which otherwise grows with every distinct word for ever.

    (Those of the `tokenizers` package, in Rust, hold 10,000 words by themselves.)
    """

    def __init__(self, special: dict[str, str], limit: int) -> None:
        super().__init__(special)
        self._special, self._limit = dict(special), limit

    def __setitem__(self, word: str, pieces: str) -> None:
        if len(self) >= self._limit:
            self.clear()
            self.update(self._special)
        super().__setitem__(word, pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        return _BoundedCache, (self._special, self._limit)
