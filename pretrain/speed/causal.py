"""Attention of causal text towers by `is_causal` instead of a dense mask, which bars the fastest kernels from a GPU."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.compat import Towers, open_clip


class CausalAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention over itself where each position sees those up to its own; same parameters, same names."""

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Attention of [B, L, D] to itself, as [B, L, D]; keys, values and the mask are those that it has anyway."""
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        rows, length, width = query.shape
        heads = projected.view(rows, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out, None


def enable(towers: Towers) -> None:
    """Let every block of a text tower that `unfit` has nothing against attend so.

    The class of a module is changed, as `fully_shard` does it: names, parameters and hooks stay as they are.
    """
    for block in _text(towers).transformer.resblocks:
        block.attn.__class__ = CausalAttention


def unfit(towers: Towers) -> str | None:
    """Why a text tower keeps its own attention; None: it need not."""
    text = _text(towers)
    kind = type(text).__name__
    if not isinstance(text, open_clip.CLIP | open_clip.transformer.TextTransformer):
        return f"the text tower ({kind}) is not open_clip's own"
    if text.attn_mask is None:
        return f"the text tower ({kind}) sees later tokens: it has no causal mask"
    if getattr(text, "cls_emb", None) is not None:
        return f"the text tower ({kind}) masks padding and its class token too"
    blocks = getattr(text.transformer, "resblocks", ())
    if other := next((type(block.attn).__name__ for block in blocks if not _is_plain(block.attn)), None):
        return f"the attention of the text tower ({other}) has a form of its own"
    return None


def _text(towers: Towers) -> Any:
    return getattr(towers, "text", towers)


def _is_plain(attention: nn.Module) -> bool:
    return (
        isinstance(attention, nn.MultiheadAttention)
        and attention.batch_first
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.dropout
    )
