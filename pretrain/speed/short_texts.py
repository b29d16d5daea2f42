"""Token columns cut to the longest caption of a pass, where nothing behind a caption's end can reach its feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.compat import Towers, open_clip
from pretrain.speed import causal

MULTIPLE = 8
"""Lengths are rounded up to multiples, which matrix units like and which keeps compiled forms few."""
Encode = Callable[[Tensor], Tensor]


def encoder(towers: Towers) -> Encode:
    """`towers.encode_text` on cut columns, [B, L] int64 -> [B, D], for towers that `unfit` has nothing against.

    The length is read from the tokens: on a GPU a pass waits for the device once.
    """
    if not hasattr(towers, "text"):
        return lambda tokens: _encode(towers, _cut(tokens, _ends(towers, tokens)))
    text = towers.text
    if isinstance(text, open_clip.transformer.TextTransformer):
        return lambda tokens: towers.encode_text(_cut(tokens, _ends(text, tokens)))
    pad: int = towers.text.config.pad_token_id
    return lambda tokens: towers.encode_text(_cut(tokens, (tokens != pad).any(0).nonzero()[-1:]))


def unfit(towers: Towers) -> str | None:
    """Why the columns of a text tower must stay; None: they need not."""
    text: Any = getattr(towers, "text", towers)
    kind = type(text).__name__
    if kind == "HFTextEncoder":
        padded = getattr(text.config, "pad_token_id", None) is not None
        return None if padded else f"the text tower ({kind}) has no padding token"
    if why := causal.unfit(towers):
        return why
    pool = _pool(text)
    if pool not in ("argmax", "eos"):
        return f"the text tower ({kind}) pools by {pool!r}, which padding takes part in"
    return None


def _pool(text: Any) -> str:
    return str(getattr(text, "text_pool_type", None) or text.pool_type)


def _ends(text: Any, tokens: Tensor) -> Tensor:
    """[B] the column of each row that the tower pools."""
    if _pool(text) == "argmax":
        return tokens.argmax(-1)
    return (tokens == _end_token(text)).int().argmax(-1)


def _end_token(text: Any) -> int:
    return int(text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id)


def _cut(tokens: Tensor, ends: Tensor) -> Tensor:
    """The columns up to the last of `ends`, and as many more as MULTIPLE wants."""
    longest = int(ends.max()) + 1 if ends.numel() else tokens.shape[1]
    return tokens[:, : -(-longest // MULTIPLE) * MULTIPLE]


def _encode(towers: Any, tokens: Tensor) -> Tensor:
    """What open_clip's CLIP, whose own `encode_text` adds the positions of all columns, does for some."""
    dtype = towers.transformer.get_cast_dtype()
    rows = towers.token_embedding(tokens).to(dtype) + towers.positional_embedding[: tokens.shape[1]].to(dtype)
    rows = towers.ln_final(towers.transformer(rows, attn_mask=None))
    pooled = rows[torch.arange(len(rows), device=rows.device), _ends(towers, tokens)]
    projection = towers.text_projection
    if isinstance(projection, torch.nn.Linear):
        return F.linear(pooled, projection.weight, projection.bias)
    projected: Tensor = pooled if projection is None else pooled @ projection
    return projected
