"""Names and layout of a transformers CLIPModel's or SiglipModel's tensors, made open_clip's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TEXT = {
    r"text_model\.embeddings\.token_embedding": "token_embedding",
    r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"text_model\.encoder\.layers": "transformer.resblocks",
    r"text_model\.final_layer_norm": "ln_final",
}
_LAYER = {
    r"\.self_attn\.qkv_proj\.": ".attn.in_proj_",
    r"\.self_attn\.": ".attn.",
    r"\.layer_norm(\d)": r".ln_\1",
    r"\.mlp\.fc1": ".mlp.c_fc",
    r"\.mlp\.fc2": ".mlp.c_proj",
}
_CLIP = {
    r"visual_projection\.weight": "visual.proj",
    r"text_projection\.weight": "text_projection",
    r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"vision_model\.embeddings\.patch_embedding": "visual.conv1",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"vision_model\.pre_layrnorm": "visual.ln_pre",
    r"vision_model\.post_layernorm": "visual.ln_post",
    r"vision_model\.encoder\.layers": "visual.transformer.resblocks",
} | _TEXT
_SIGLIP_IMAGE = {
    r"vision_model\.embeddings\.patch_embedding": "visual.trunk.patch_embed.proj",
    r"vision_model\.embeddings\.position_embedding\.weight": "visual.trunk.pos_embed",
    r"vision_model\.encoder\.layers": "visual.trunk.blocks",
    r"vision_model\.post_layernorm": "visual.trunk.norm",
    r"vision_model\.head\.probe": "visual.trunk.attn_pool.latent",
    r"vision_model\.head\.attention\.out_proj": "visual.trunk.attn_pool.proj",
    r"vision_model\.head\.attention\.(q|kv)_proj": r"visual.trunk.attn_pool.\1",
    r"vision_model\.head\.layernorm": "visual.trunk.attn_pool.norm",
    r"vision_model\.head": "visual.trunk.attn_pool",
    r"\.self_attn\.qkv_proj": ".attn.qkv",
    r"\.self_attn\.out_proj": ".attn.proj",
    r"\.layer_norm": ".norm",
}
_SIGLIP_TEXT = {old: f"text.{new}" for old, new in _TEXT.items()} | {r"text_model\.head": "text.text_projection"}


def renamed(kind: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under open_clip's names, in its layout: joint queries, keys and values, projections [in, out].

    Args:
        kind: 'clip' or 'siglip'.
        tensors: of all of the folder's files; names that are not known stay as they are, for the caller to refuse.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        return found
    found = _joined(_split_pool(found))
    rename = _clip_name if kind == "clip" else _siglip_name
    found = {rename(name): tensor for name, tensor in found.items()}
    for name in ("visual.proj", "text_projection"):
        if name in found:
            found[name] = found[name].T
    if "visual.trunk.pos_embed" in found:
        found["visual.trunk.pos_embed"] = found["visual.trunk.pos_embed"][None]
    return found


def _clip_name(name: str) -> str:
    return _replaced(name, _CLIP | _LAYER)


def _siglip_name(name: str) -> str:
    return _replaced(name, _SIGLIP_TEXT | _LAYER if name.startswith("text_model.") else _SIGLIP_IMAGE)


def _replaced(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(old if old.startswith(r"\.") else f"^{old}", new, name)
    return name


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With each layer's q_proj, k_proj and v_proj as one qkv_proj."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
        if part is None:
            found[name] = tensor
        elif part[1] == "q":
            names = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            if all(each in tensors for each in names):
                found[name.replace(".q_proj.", ".qkv_proj.")] = torch.cat([tensors[each] for each in names])
    return found


def _split_pool(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the pooling head's joint matrix as q_proj and kv_proj, which is how timm holds it."""
    found = dict(tensors)
    for kind in ("weight", "bias"):
        if (joint := found.pop(f"vision_model.head.attention.in_proj_{kind}", None)) is not None:
            width = len(joint) // 3
            found[f"vision_model.head.attention.q_proj.{kind}"] = joint[:width]
            found[f"vision_model.head.attention.kv_proj.{kind}"] = joint[width:]
    return found
