"""A folder as transformers saves a CLIPModel or SiglipModel: what it says of the model, and where its weights are.

Its JSON alone is read; transformers itself is not needed. `renames` gives the tensors their names here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pretrain.errors import UserError

_ACTIVATIONS = {"quick_gelu": "QuickGELU", "gelu": "GELU", "gelu_pytorch_tanh": "GELU (tanh)"}
_SIDES = ("image", "text")
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Saved:
    """What a folder says of its model before the weights are read."""

    kind: str
    """'clip' or 'siglip'."""
    files: list[Path]
    """That hold the weights."""
    quick_gelu: bool
    preprocess: dict[str, Any] = field(default_factory=dict)
    """open_clip's preprocess_cfg as far as known, without the size."""
    computes: dict[str, Any] = field(default_factory=dict)
    """What no tensor's shape shows, as `computes` tells it of a built model."""


def read(folder: Path, where: str) -> Saved:
    """The description in a folder's config.json and preprocessor_config.json.

    Args:
        where: the folder as in the config, for messages.

    Raises:
        UserError: a JSON or the weights are missing or damaged, or the model is no plain CLIP or SigLIP.
    """
    described = _json(folder / "config.json", where)
    kind = str(described.get("model_type"))
    if kind not in ("clip", "siglip"):
        raise UserError(f"model.pretrained {where}: model_type {kind!r} in config.json is not clip or siglip; take one")
    image, text = (described.get(f"{tower}_config") or {} for tower in ("vision", "text"))
    default = "quick_gelu" if kind == "clip" else "gelu_pytorch_tanh"
    used = [tower.get("hidden_act", default) for tower in (image, text)]
    if unknown := [name for name in used if name not in _ACTIVATIONS]:
        raise UserError(f"model.pretrained {where}: hidden_act {unknown[0]!r} is none of {', '.join(_ACTIVATIONS)}")
    if len({name == "quick_gelu" for name in used}) > 1:
        raise UserError(f"model.pretrained {where}: hidden_act {used} of its towers: open_clip has one for both")
    acts = {f"{side} activation": _ACTIVATIONS[name] for side, name in zip(_SIDES, used, strict=True)}
    files, preprocess = _files(folder, where), _preprocess(folder, where, kind)
    return Saved(kind, files, used[0] == "quick_gelu", preprocess, _said(kind, image, text) | acts)


def computes(towers: nn.Module) -> dict[str, Any]:
    """What a built model whose tensors fit computes beyond what their shapes show, in the words of `Saved.computes`."""
    visual: Any = towers.visual
    text: Any = getattr(towers, "text", towers)
    if hasattr(visual, "trunk"):
        block = visual.trunk.blocks[0]
        of_image = (block.attn.num_heads, block.norm1.eps, "attention", block.mlp.act)
    else:
        block = visual.transformer.resblocks[0]
        of_image = (block.attn.num_heads, block.ln_1.eps, visual.pool_type, block.mlp.gelu)
    block = text.transformer.resblocks[0]
    pool = text.pool_type if hasattr(text, "pool_type") else text.text_pool_type
    of_text = (block.attn.num_heads, block.ln_1.eps, pool, block.mlp.gelu)
    found: dict[str, Any] = {"text mask": "none" if text.attn_mask is None else "causal"}
    for side, (heads, eps, pool, act) in zip(_SIDES, (of_image, of_text), strict=True):
        found |= {f"{side} heads": heads, f"{side} norm eps": eps, f"{side} pooling": pool}
        found[f"{side} activation"] = _activation(act)
    return found


def _said(kind: str, image: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says, with transformers' defaults where it says nothing."""
    eps, clip = (1e-5, True) if kind == "clip" else (1e-6, False)
    last = text.get("vocab_size", 49408) - 1
    # 2 stands in old files for the highest token, which open_clip looks for; any other one is looked for by its number.
    end = text.get("eos_token_id", 49407)
    pooling = "last" if not clip else "argmax" if end in (2, last) else f"token {end}"
    return {
        "text mask": "causal" if clip else "none",
        "image heads": image.get("num_attention_heads", 12),
        "image norm eps": image.get("layer_norm_eps", eps),
        "image pooling": "tok" if clip else "attention" if image.get("vision_use_head", True) else "none",
        "text heads": text.get("num_attention_heads", 8 if clip else 12),
        "text norm eps": text.get("layer_norm_eps", eps),
        "text pooling": pooling,
    }


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "GELU" if module.approximate == "none" else "GELU (tanh)"
    return "GELU (tanh)" if type(module).__name__ == "GELUTanh" else type(module).__name__


def _files(folder: Path, where: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return [folder / Path(str(name)).name for name in sorted({*_json(index, where).get("weight_map", {}).values()})]
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    raise UserError(f"model.pretrained {where}: no model.safetensors or pytorch_model.bin beside config.json; add one")


def _preprocess(folder: Path, where: str, kind: str) -> dict[str, Any]:
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    known: dict[str, Any] = {} if kind == "clip" else half | {"interpolation": "bicubic", "resize_mode": "squash"}
    path = folder / "preprocessor_config.json"
    said = _json(path, where) if path.is_file() else {}
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        known |= {key: said[name]} if said.get(name) else {}
    return known | ({"interpolation": _RESAMPLE[said["resample"]]} if said.get("resample") in _RESAMPLE else {})


def _json(path: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model.pretrained {where}: {path.name} is damaged ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise UserError(f"model.pretrained {where}: {path.name} is damaged (no object)")
    return found
