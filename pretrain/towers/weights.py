"""Where a model's first weights come from: an open_clip tag, a file, an exported or transformers' folder, or a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain import checkpoint, config
from pretrain.compat import Towers, open_clip
from pretrain.errors import UserError
from pretrain.towers import architecture, foreign, renames

log = logging.getLogger(__name__)

PICKLED, SAFE = (".pt", ".pth", ".bin", ".ckpt"), (".safetensors",)
_PREFIXES = ("module.", "_orig_mod.", "towers.")
"""What DDP, torch.compile and our own model put before open_clip's names."""
_HEAD = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class Origin:
    """Where weights are, and what is known of them before they are read."""

    where: str
    """As in the config, for messages."""
    read: Callable[[], Mapping[str, Any]]
    """The tensors by name, as they are stored. UserError where they cannot be read."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """open_clip's preprocess_cfg as far as known; never the size, which is the model's."""
    quick_gelu: bool | None = None
    """Which activation the weights were trained with, where that is known."""
    computes: dict[str, Any] = field(default_factory=dict)
    """What else the weights were trained with that no shape shows; see `foreign.computes`."""


@dataclass(frozen=True)
class Head:
    """What a checkpoint says of scale and bias."""

    log_scale: float | None
    """ln of the factor."""
    bias: float | None


def origin(model: config.Model, towers: Mapping[str, Any]) -> Origin | None:
    """Where `model.pretrained` points, or None where it is empty. Reads descriptions only: no weights, no network.

    Args:
        model: the model section.
        towers: its architecture, in open_clip's words.

    Raises:
        UserError: it is neither a tag of this model nor something on disk, or its activation is not the model's.
    """
    if model.pretrained is None:
        return None
    found = _find(model, model.pretrained)
    # timm and Hugging Face towers bring their own activation, whatever quick_gelu says.
    is_native = "timm_model_name" not in towers["vision_cfg"] or "hf_model_name" not in towers["text_cfg"]
    if is_native and found.quick_gelu not in (None, towers["quick_gelu"]):
        fix = "set model.quick_gelu: true" if found.quick_gelu else "take the model without QuickGELU"
        had, has = ("QuickGELU", "GELU") if found.quick_gelu else ("GELU", "QuickGELU")
        raise UserError(
            f"model.pretrained {found.where} was trained with {had} but model.name {model.name} computes {has}: {fix}"
        )
    return found


def load(towers: Towers, found: Origin, name: str) -> Head:
    """Put all weights into the towers but scale and bias, which are returned.

    Args:
        towers: open_clip's CLIP or CustomTextCLIP, on the CPU.
        found: where the weights are.
        name: the model's name, for messages.

    Raises:
        UserError: the weights cannot be read, hold more than tensors, or do not fit.
    """
    tensors = clean(found.read(), found.where)
    scale, bias = (tensors.pop(key, None) for key in _HEAD)
    try:
        tensors = _converted(towers, tensors)
    except (AssertionError, RuntimeError, AttributeError) as error:
        raise UserError(f"model.pretrained {found.where} does not fit model.name {name}: {error}") from None
    expected = {key: value for key, value in towers.state_dict().items() if key not in _HEAD}
    if problems := _problems(expected, tensors):
        raise UserError(f"model.pretrained {found.where} does not fit model.name {name}: {problems}")
    _refuse_other_arithmetic(towers, found, name)
    towers.load_state_dict(tensors, strict=False)
    return Head(None if scale is None else float(scale), None if bias is None else float(bias))


def clean(stored: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors under open_clip's names, whatever wrapped the model when they were saved.

    Raises:
        UserError: there are none, or something else lies between them.
    """
    inside = stored.get("state_dict", stored)
    if not isinstance(inside, Mapping) or not inside or not all(isinstance(item, Tensor) for item in inside.values()):
        raise UserError(f"model.pretrained {where} is no model's state_dict: it must map names to tensors")
    return {_bare(name): tensor for name, tensor in inside.items()}


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _find(model: config.Model, where: str) -> Origin:
    name, path = Path(model.name).stem if model.name.endswith(".json") else model.name, Path(where).expanduser()
    if tag := open_clip.get_pretrained_cfg(name, where):
        return Origin(where, lambda: _read_file(_download(tag, where)), _without_size(tag), bool(tag.get("quick_gelu")))
    if (path / "open_clip_config.json").is_file():
        return _exported(path, where)
    if (path / "config.json").is_file():
        return _of_transformers(path, where)
    if path.is_dir():
        return _own_run(path, where)
    if path.suffix in SAFE + PICKLED:
        return Origin(where, lambda: _read_file(path))
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise UserError(f"model.pretrained {where} is no file, folder or tag of model.name {model.name}; its tags: {tags}")


def _exported(path: Path, where: str) -> Origin:
    try:
        description = json.loads((path / "open_clip_config.json").read_text())
        quick_gelu = bool(description["model_cfg"].get("quick_gelu"))
        preprocess = _without_size(description.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.pretrained {where}: open_clip_config.json is damaged ({error})") from None
    return Origin(where, lambda: _read_file(path / "open_clip_model.safetensors"), preprocess, quick_gelu)


def _of_transformers(path: Path, where: str) -> Origin:
    saved = foreign.read(path, where)

    def tensors() -> Mapping[str, Any]:
        return renames.renamed(
            saved.kind, {key: item for file in saved.files for key, item in _read_file(file).items()}
        )

    return Origin(where, tensors, saved.preprocess, saved.quick_gelu, saved.computes)


def _refuse_other_arithmetic(towers: Towers, found: Origin, name: str) -> None:
    """Refuse weights that fit by their shapes but were trained with other heads, masks, norms or pooling."""
    own = foreign.computes(towers) if found.computes else {}
    other = [f"{key} {value}, here {own[key]}" for key, value in found.computes.items() if own[key] != value]
    # Published SigLIP weights, trained with tanh's approximation, run in open_clip with the exact GELU (5e-4 apart).
    near = [item for item in other if "activation GELU" in item]
    if len(other) > len(near):
        wrong = "; ".join(item for item in other if item not in near)
        raise UserError(
            f"model.pretrained {found.where} does not fit model.name {name}: {wrong}; take the matching model"
        )
    if near:
        log.warning("model.pretrained %s: %s", found.where, "; ".join(near))


def _own_run(path: Path, where: str) -> Origin:
    folder = checkpoint.locate(path)
    model = checkpoint.read_run(folder).model
    towers = architecture.find(model).towers
    before = origin(model, towers)
    preprocess = before.preprocess if before else {}
    return Origin(
        where, lambda: checkpoint.read_weights(folder, checkpoint.has_average(folder)), preprocess, towers["quick_gelu"]
    )


def _without_size(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    known = ("mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
    return {key: preprocess[key] for key in known if preprocess.get(key) is not None}


def _download(tag: dict[str, Any], where: str) -> Path:
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # whatever the network and the hub's client raise; none of it is ours to fix
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.pretrained {where} could not be downloaded ({reason}): check the network, or give a file"
        ) from error


def _read_file(path: Path) -> Mapping[str, Any]:
    """A checkpoint file. Pickles are read with tensors only: a file that wants to run code is refused."""
    if path.suffix not in SAFE + PICKLED:
        raise UserError(f"model.pretrained {path}: unknown kind of file; take one of {', '.join(SAFE + PICKLED)}")
    if not path.is_file():
        raise UserError(f"model.pretrained {path}: there is no such file")
    try:
        stored = load_file(path) if path.suffix in SAFE else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors each raise half a dozen kinds for one cause: a bad file
        raise UserError(
            f"model.pretrained {path} holds more than tensors, or is damaged ({type(error).__name__}); nothing in it "
            f"was run: save the state_dict alone, best as .safetensors"
        ) from error
    if not isinstance(stored, Mapping):
        raise UserError(
            f"model.pretrained {path} holds a {type(stored).__name__}, not a state_dict; save the state_dict alone"
        )
    return stored


def _converted(towers: Towers, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What open_clip does to older and foreign names, and to position embeddings of another resolution or length."""
    factory = open_clip.factory
    tensors = factory.convert_state_dict(towers, tensors)
    if "positional_embedding" in tensors and not hasattr(towers, "positional_embedding"):
        tensors = factory.convert_to_custom_text_state_dict(tensors)
    if not hasattr(towers, "text"):
        tensors = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    position_ids = "text.transformer.embeddings.position_ids"  # a buffer until transformers 4.31
    if position_ids not in towers.state_dict():
        tensors.pop(position_ids, None)
    factory.resize_pos_embed(tensors, towers)
    factory.resize_text_pos_embed(tensors, towers)
    return tensors


def _problems(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being exactly the expected ones, in one line; '' where nothing does."""
    reshaped = [key for key in expected if key in tensors and tensors[key].shape != expected[key].shape]
    found = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [f"{key} {list(tensors[key].shape)} for {list(expected[key].shape)}" for key in reshaped],
    }
    return "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in found.items() if keys)
