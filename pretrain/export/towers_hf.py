"""Towers in the words of transformers' CLIPModel and SiglipModel: which of the two they are, config and tensors.

towers/foreign.py and towers/renames.py go the other way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pretrain.compat import open_clip
from pretrain.errors import UserError
from pretrain.export.base import Asked
from pretrain.model import DualEncoder
from pretrain.towers import foreign

_ACTS = {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELU (tanh)": "gelu_pytorch_tanh"}
_LAYER = {
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.mlp\.(?:c_fc|fc1)\.": ".mlp.fc1.",
    r"\.mlp\.(?:c_proj|fc2)\.": ".mlp.fc2.",
    r"\.attn\.(?:out_proj|proj)\.": ".self_attn.out_proj.",
    r"\.attn\.(?:in_proj_|qkv\.)": ".self_attn.qkv_proj.",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "transformer.resblocks": "text_model.encoder.layers",
    "text_projection.": "text_model.head.",
    "text_projection": "text_projection.weight",
}
_IMAGE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    "visual.trunk.blocks": "vision_model.encoder.layers",
    "visual.trunk.norm": "vision_model.post_layernorm",
    "visual.trunk.attn_pool.latent": "vision_model.head.probe",
    "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
    "visual.trunk.attn_pool.q.": "vision_model.head.attention.q_proj.",
    "visual.trunk.attn_pool.kv.": "vision_model.head.attention.kv_proj.",
    "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
    "visual.trunk.attn_pool.mlp": "vision_model.head.mlp",
}


def kind_of(encoder: DualEncoder, asked: Asked) -> str:
    """'clip' or 'siglip'.

    Raises:
        UserError: transformers has no class that holds these towers; the message tells which part does not fit.
    """
    towers = encoder.towers
    kinds = {"image": _image_kind(towers.visual)} if asked.image else {}
    kinds |= {"text": _text_kind(getattr(towers, "text", towers))} if asked.text else {}
    for side, (kind, reason) in kinds.items():
        if not kind:
            raise UserError(f"transformers' CLIPModel and SiglipModel cannot hold the {side} tower: {reason}")
    found = {kind for kind, _ in kinds.values()}
    if len(found) > 1:
        raise UserError(
            f"transformers has no model with an image tower as {kinds['image'][0]}'s beside a text tower as "
            f"{kinds['text'][0]}'s: export them alone, with --tower image and --tower text"
        )
    size = encoder.image_spec.size
    if asked.image and size[0] != size[1]:
        raise UserError(f"transformers' image towers take square images, and this one takes {size[0]} by {size[1]}")
    return found.pop()


def config(encoder: DualEncoder, kind: str, asked: Asked) -> dict[str, Any]:
    """config.json, as transformers' class of that kind reads it."""
    named = {"both": "Model", "image": "VisionModel", "text": "TextModel"}[asked.tower]
    alone = "WithProjection" if kind == "clip" and asked.tower != "both" else ""
    found: dict[str, Any] = {"architectures": [{"clip": "CLIP", "siglip": "Siglip"}[kind] + named + alone]}
    found |= {"torch_dtype": "float32"}
    image = _image_config(encoder, kind) if asked.image else {}
    text = _text_config(encoder, kind) if asked.text else {}
    if asked.tower == "both":
        width = {"projection_dim": text["projection_dim"]} if kind == "clip" else {}
        joint = {"model_type": kind, "text_config": text, "vision_config": image, "logit_scale_init_value": 2.6592}
        found |= joint | width
    else:
        model_type = f"{kind}_{'vision' if asked.image else 'text'}_model"
        found |= (image or text) | {"model_type": model_type}
    return found


def tensors(encoder: DualEncoder, kind: str, asked: Asked) -> dict[str, Tensor]:
    """The weights under transformers' names, in its layout.

    Raises:
        UserError: one of them has no place there.
    """
    found: dict[str, Tensor] = {}
    wanted = {"both": ("image", "text", "head"), "image": ("image",), "text": ("text",)}[asked.tower]
    for name, tensor in encoder.towers.state_dict().items():
        if DualEncoder.tower_of(name) not in wanted:
            continue
        found |= dict(_named(name.removeprefix("text."), tensor.detach(), kind))
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def _named(name: str, tensor: Tensor, kind: str) -> Iterator[tuple[str, Tensor]]:
    if name in ("logit_scale", "logit_bias"):
        if kind == "siglip":
            yield name, tensor.reshape(1)
        elif name == "logit_scale":
            yield name, tensor.reshape(())
        return
    new = _renamed(name)
    if name == "visual.trunk.pos_embed":
        tensor = tensor[0]
    if new in ("visual_projection.weight", "text_projection.weight"):
        tensor = tensor.T if name in ("visual.proj", "text_projection") else tensor
    yield from _split(new, tensor)


def _renamed(name: str) -> str:
    table = _IMAGE if name.startswith("visual.") else _TEXT
    for old, new in table.items():
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    else:
        raise UserError(f"transformers' CLIPModel and SiglipModel have no place for the weight {name}")
    for old, new in _LAYER.items():
        name = re.sub(old, new, name)
    return name


def _split(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Joint queries, keys and values apart; timm's pooling head joined, as torch's attention holds it."""
    if ".self_attn.qkv_proj." in name:
        yield from (
            (name.replace(".qkv_proj.", f".{letter}_proj."), x)
            for letter, x in zip("qkv", tensor.chunk(3), strict=True)
        )
    else:
        yield name, tensor


def joined_pool(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the pooling head's queries, keys and values as one matrix, as SiglipModel holds them."""
    import torch

    start, left = "vision_model.head.attention.", dict(found)
    for kind in ("weight", "bias"):
        if f"{start}q_proj.{kind}" in left:
            parts = [left.pop(f"{start}{name}_proj.{kind}") for name in ("q", "kv")]
            left[f"{start}in_proj_{kind}"] = torch.cat(parts)
    return left


def _image_kind(visual: Any) -> tuple[str, str]:
    """'clip', 'siglip' or '', and why neither."""
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        plain = visual.pool_type == "tok" and visual.attn_pool is None and not isinstance(visual.ln_pre, nn.Identity)
        return ("clip", "") if plain else ("", f"it pools by {visual.pool_type!r} or lacks the norm before its blocks")
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return "", f"it is a {type(visual).__name__}, and only plain vision transformers have a place there"
    if type(trunk).__name__ != "VisionTransformer" or getattr(trunk, "attn_pool", None) is None:
        return "", f"it is timm's {type(trunk).__name__} without pooling by attention"
    if trunk.cls_token is not None or len(list(visual.head.parameters())):
        return "", "it has a class token or a projection behind its pooling, which SiglipModel has not"
    return "siglip", ""


def _text_kind(text: Any) -> tuple[str, str]:
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    if pool is None or not hasattr(text, "token_embedding"):
        return "", f"it is a {type(getattr(text, 'transformer', text)).__name__} of Hugging Face: export that by itself"
    linear = isinstance(text.text_projection, nn.Linear)
    if text.attn_mask is not None and pool == "argmax" and not linear and getattr(text, "cls_emb", None) is None:
        return "clip", ""
    if text.attn_mask is None and pool == "last" and linear and not getattr(text, "use_pad_mask", False):
        return "siglip", ""
    mask = "none" if text.attn_mask is None else "causal"
    return (
        "",
        f"its mask is {mask} and it pools by {pool!r}; CLIPModel has causal and 'argmax', SiglipModel none and 'last'",
    )


def _image_config(encoder: DualEncoder, kind: str) -> dict[str, Any]:
    visual = encoder.towers.visual
    said = foreign.computes(encoder.towers)
    if kind == "clip":
        conv, blocks = visual.conv1, visual.transformer.resblocks
        inner, width = len(blocks[0].mlp.c_fc.weight), {"projection_dim": visual.proj.shape[1]}
    else:
        conv, blocks = visual.trunk.patch_embed.proj, visual.trunk.blocks
        inner, width = len(blocks[0].mlp.fc1.weight), {"vision_use_head": True}
    if len(set(conv.kernel_size)) > 1:
        raise UserError(f"transformers' image towers cut square patches, and this one {conv.kernel_size}")
    found = {"image_size": encoder.image_spec.size[0], "patch_size": conv.kernel_size[0]}
    return found | _shared(said, "image", conv.out_channels, inner, len(blocks)) | width


def _text_config(encoder: DualEncoder, kind: str) -> dict[str, Any]:
    text: Any = getattr(encoder.towers, "text", encoder.towers)
    blocks, projection = text.transformer.resblocks, text.text_projection
    rows, width = text.token_embedding.weight.shape
    inner = len(blocks[0].mlp.c_fc.weight)
    found = {"vocab_size": rows, "max_position_embeddings": len(text.positional_embedding)}
    found |= _shared(foreign.computes(encoder.towers), "text", width, inner, len(blocks))
    if kind == "siglip":
        return found | {"projection_size": projection.out_features}
    # 2 makes transformers look for the highest token, as open_clip does; CLIP's own end of text is that token.
    ends = (
        {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407} if rows == 49408 else {"eos_token_id": 2}
    )
    return found | {"projection_dim": projection.shape[1]} | ends


def _shared(said: Mapping[str, Any], side: str, width: int, inner: int, layers: int) -> dict[str, Any]:
    act = said[f"{side} activation"]
    if act not in _ACTS:
        raise UserError(
            f"transformers' CLIPModel and SiglipModel have no activation {act}, which the {side} tower uses"
        )
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    heads = {"num_attention_heads": said[f"{side} heads"], "layer_norm_eps": said[f"{side} norm eps"]}
    return sizes | heads | {"hidden_act": _ACTS[act]}
