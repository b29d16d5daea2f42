"""Locking towers, as locked-image tuning does (Zhai et al. 2022, arXiv:2111.07991): by parameter name, for any tower.

A tower is a list of groups, input first: embeddings, one group a layer (the last with what follows it), projection. The
projection that open_clip puts on top of a timm or Hugging Face trunk belongs to no group: it starts fresh and always
trains, as with open_clip. A native open_clip projection is the last group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pretrain import config
from pretrain.compat import Towers
from pretrain.errors import UserError

Groups = list[list[str]]
"""Parameter names, relative to open_clip's model, first layers first."""


@dataclass(frozen=True)
class Frozen:
    """What locking leaves behind."""

    parameters: frozenset[str]
    """Names whose gradient is off."""
    still: frozenset[str]
    """Names of normalisation modules whose running statistics must not move."""


def apply(towers: Towers, model: config.Model) -> Frozen:
    """Freeze what the config locks.

    Args:
        towers: open_clip's CLIP or CustomTextCLIP.
        model: the knobs lock_image, lock_text, lock_norms.

    Raises:
        UserError: the tower has no layers to leave unlocked, or fewer than asked.
    """
    frozen: set[str] = set()
    if model.lock_image is not None:
        groups = _kept(image_groups(towers), model.lock_image, "model.lock_image")
        frozen |= _freeze(towers, groups, model.lock_norms)
    if model.lock_text is not None:
        groups = _kept(text_groups(towers), model.lock_text, "model.lock_text")
        frozen |= _freeze(towers, groups, model.lock_norms)
    return Frozen(frozenset(frozen), frozenset(_still(towers, frozen)))


def image_groups(towers: Towers) -> Groups:
    """Parameter groups of the image tower, native ViT or ResNet, or timm."""
    visual: Any = towers.visual
    if hasattr(visual, "trunk"):
        return _timm_groups(visual.trunk, "visual.trunk.")
    if hasattr(visual, "attnpool"):
        stages = [r"layer1\.", r"layer2\.", r"layer3\.", r"layer4\.", r"attnpool\."]
        return _by_pattern(visual, "visual.", stages)
    return _by_layers(visual, "visual.", visual.transformer.resblocks, "transformer.resblocks", "proj")


def text_groups(towers: Towers) -> Groups:
    """Parameter groups of the text tower, native (inside or beside the model) or Hugging Face."""
    text = getattr(towers, "text", None)
    if text is None:
        return _by_layers(
            towers, "", towers.transformer.resblocks, "transformer.resblocks", "text_projection", _is_text
        )
    if hasattr(text.transformer, "resblocks"):
        return _by_layers(text, "text.", text.transformer.resblocks, "transformer.resblocks", "text_projection")
    path, layers = _layer_list(text.transformer)
    return _by_layers(text.transformer, "text.transformer.", layers, path, None)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, of torch, timm, open_clip or transformers."""
    return "norm" in type(module).__name__.lower()


def _kept(groups: Groups, unlocked: int, knob: str) -> Groups:
    if not 0 <= unlocked <= len(groups):
        raise UserError(
            f"{knob} {unlocked} exceeds the {len(groups)} groups of this tower; lower it, or do not lock the tower"
        )
    return groups[: len(groups) - unlocked]


def _freeze(towers: Towers, groups: Groups, norms: bool) -> set[str]:
    names = {name for group in groups for name in group}
    if not norms:
        names -= _norm_parameters(towers)
    for name in names:
        towers.get_parameter(name).requires_grad_(False)
    return names


def _norm_parameters(towers: Towers) -> set[str]:
    norms = ((path, module) for path, module in towers.named_modules() if is_norm(module))
    return {f"{path}.{name}" for path, module in norms for name, _ in module.named_parameters(recurse=False)}


def _still(towers: Towers, frozen: set[str]) -> Iterable[str]:
    """Modules with running statistics whose own parameters are all frozen."""
    for path, module in towers.named_modules():
        own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if own and getattr(module, "running_mean", None) is not None and frozen.issuperset(own):
            yield path


def _timm_groups(trunk: Any, prefix: str) -> Groups:
    from timm.models import group_parameters

    if not hasattr(trunk, "group_matcher"):
        raise UserError(
            f"model.lock_image: timm's {type(trunk).__name__} does not tell its layers; train it, or take another"
        )
    found: dict[int, list[str]] = group_parameters(trunk, trunk.group_matcher(coarse=False))
    return [[prefix + name for name in found[key]] for key in sorted(found)]


def _by_pattern(tower: nn.Module, prefix: str, patterns: list[str]) -> Groups:
    """First what matches no pattern, then one group a pattern."""
    names = [name for name, _ in tower.named_parameters()]
    matched = [[prefix + name for name in names if re.match(pattern, name)] for pattern in patterns]
    taken = {name for group in matched for name in group}
    return [[prefix + name for name in names if prefix + name not in taken], *matched]


def _by_layers(
    tower: nn.Module,
    prefix: str,
    layers: nn.ModuleList,
    path: str,
    projection: str | None,
    belongs: Callable[[str], bool] = lambda name: True,
) -> Groups:
    """Embeddings, each layer, the projection; what runs after the layers joins the last of them."""
    names = [name for name, _ in tower.named_parameters() if belongs(name)]
    groups: Groups = [[] for _ in range(len(layers) + 2)]
    for name in names:
        groups[_position(name, path, len(layers), projection)].append(prefix + name)
    return [group for group in groups if group]


def _position(name: str, path: str, depth: int, projection: str | None) -> int:
    """Group of a parameter: 0 before the layers, 1 to depth a layer, depth + 1 the projection."""
    layer = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1
    if projection and re.match(rf"{projection}(\.|$)", name):
        return depth + 1
    # Names of what runs behind the layers: final norms and poolers, of open_clip and of transformers.
    return (
        depth if re.match(r"(.*\.)?(ln_post|ln_final|attn_pool|final_layer_norm|pooler|norm|layernorm)\.", name) else 0
    )


def _layer_list(trunk: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and layers of a Hugging Face encoder: its longest list of modules, the outermost where several are equal."""
    lists = [(path, module) for path, module in trunk.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"model.lock_text: {type(trunk).__name__} has no list of layers; train the tower, or take another"
        )
    return max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))


def _is_text(name: str) -> bool:
    return not name.startswith(("visual.", "logit_"))
