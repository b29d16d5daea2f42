"""A model's tokenizer in the forms that other libraries read."""

from __future__ import annotations

import copy
import string
from pathlib import Path
from typing import Any

from pretrain.compat import open_clip
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.model import DualEncoder

_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
"""open_clip's names of CLIP's ends of a text, and everybody else's."""


def of(encoder: DualEncoder) -> Any:
    """open_clip's tokenizer of a model: a SimpleTokenizer (CLIP's own), or an HFTokenizer around a Hugging Face one.

    Raises:
        UserError: it cannot be loaded.
    """
    tokenizer.build(encoder.architecture.name)
    return open_clip.get_tokenizer(encoder.architecture.name)


def transformers_form(encoder: DualEncoder) -> Any:
    """A transformers tokenizer that cleans, pads and cuts texts as the model's own.

    Raises:
        UserError: no such tokenizer can do what the model's own does.
    """
    made = of(encoder)
    if isinstance(made, open_clip.SimpleTokenizer):
        return _clip(made)
    if made.tokenizer_mode or made.strip_sep_token:
        raise UserError(
            "the tokenizer changes tokens after the fact (tokenizer_mode, strip_sep_token): no library else does"
        )
    found = copy.deepcopy(made.tokenizer)
    found.model_max_length = made.context_length
    _clean_first(found, made.clean_fn)
    return found


def write_json(encoder: DualEncoder, folder: Path) -> None:
    """tokenizer.json for the `tokenizers` library, which pads and cuts to the model's context length."""
    found = transformers_form(encoder)
    if not found.is_fast:
        return
    made, length = of(encoder), found.model_max_length
    backend = found.backend_tokenizer
    pad = int(0 if isinstance(made, open_clip.SimpleTokenizer) else found.pad_token_id)
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=pad, pad_token=backend.id_to_token(pad), direction=found.padding_side)
    backend.save(str(folder / "tokenizer.json"))


def _clip(made: Any) -> Any:
    """CLIP's byte-pair encoding, from the merges that open_clip carries."""
    from transformers import CLIPTokenizer

    if made.clean_fn is not open_clip.tokenizer.get_clean_fn("lower") or len(made.all_special_ids) != 2:
        raise UserError(
            "text_cfg.tokenizer_kwargs: transformers' CLIPTokenizer lowers all text and has no tokens to add"
        )
    vocabulary = {_SPECIAL.get(word, word): number for word, number in made.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(made.bpe_ranks), model_max_length=made.context_length)


def _clean_first(found: Any, clean: Any) -> None:
    """Put open_clip's cleaning of a text in front of a tokenizer's own, as far as it can be said in its words."""
    known = {name: open_clip.tokenizer.get_clean_fn(name) for name in ("canonicalize", "lower", "whitespace")}
    name = next((name for name, function in known.items() if function is clean), "another function")
    if name == "whitespace" and not found.is_fast:
        return
    if not found.is_fast or name not in known:
        raise UserError(
            f"the tokenizer cleans texts by {name}, which {type(found).__name__} cannot be told; use a fast one"
        )
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if name == "canonicalize":
        marks = "".join(f"\\{mark}" for mark in string.punctuation if mark != "_")
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{marks}]"), "")]
    steps += [normalizers.Lowercase()] if name != "whitespace" else []
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    own = found.backend_tokenizer.normalizer
    found.backend_tokenizer.normalizer = normalizers.Sequence([*steps, *([own] if own is not None else [])])
