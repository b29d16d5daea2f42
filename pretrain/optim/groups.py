"""Which parameters share a decay and a rate: by name, for every tower that `towers.freeze` knows the layers of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from pretrain.config import Optim
from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.towers import freeze


@dataclass(frozen=True)
class Group:
    """Trainable parameters that are updated alike."""

    weight_decay: float
    lr_scale: float
    """Share of the step's learning rate."""
    hidden: bool
    """Matrices inside the layers, where the optimizer treats them apart."""
    params: dict[str, nn.Parameter] = field(default_factory=dict)


def split(model: nn.Module, optim: Optim) -> list[Group]:
    """The trainable parameters in groups; those without decay come first.

    Raises:
        UserError: a pattern of optim.no_decay fits nothing, a tower does not tell its layers, or has no matrices.
    """
    spared = undecayed(model) | _matching(model, optim.no_decay)
    scales = _scales(model, optim)
    matrices = _hidden_matrices(model, spared) if optim.name == "muon" else set()
    groups: dict[tuple[bool, float, bool], Group] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            key = (name not in spared, scales[name], name in matrices)
            group = Group(optim.weight_decay if key[0] else 0.0, *key[1:])
            groups.setdefault(key, group).params[name] = param
    return [groups[key] for key in sorted(groups)]


def report(groups: list[Group], optim: Optim) -> Iterator[str]:
    """What was found, a line each, where more was asked for than one rate and AdamW."""
    if optim.layer_decay != 1 or optim.image_lr != 1 or optim.text_lr != 1:
        for tower in ("image", "text", "head"):
            scales = [g.lr_scale for g in groups if any(DualEncoder.tower_of(name) == tower for name in g.params)]
            if scales:
                what, count = "scale and bias" if tower == "head" else f"{tower} tower", len(set(scales))
                yield f"optim: {what} at {min(scales):.3g} to {max(scales):.3g} of the rate ({count} values)"
    if optim.name == "muon":
        sizes: Counter[bool] = Counter()
        for group in groups:
            sizes[group.hidden] += sum(param.numel() for param in group.params.values())
        yield f"optim: Muon for {sizes[True]:,} weights in matrices, AdamW for the other {sizes[False]:,}"


def undecayed(model: nn.Module) -> set[str]:
    """Names of parameters without weight decay: vectors, norms, scale and bias, and what a tower itself asks for.

    Source: open_clip's training script (fewer than two dimensions, or bn, ln, bias or logit_scale in the name), joined
    with the `no_weight_decay()` of open_clip's and timm's modules (position and class embeddings).
    """
    asked = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(wishes := getattr(module, "no_weight_decay", None))
        for name in wishes()
    }
    words = ("bn", "ln", "bias", "logit_scale")
    return {n for n, p in model.named_parameters() if n in asked or p.ndim < 2 or any(word in n for word in words)}


def _matching(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        fits = {name for name in names if fnmatchcase(name, pattern)}
        if not fits:
            raise UserError(
                f"optim.no_decay {pattern!r} fits no parameter; they are named like {names[0]} and {names[-1]}, and * "
                "stands for any letters"
            )
        found |= fits
    return found


def _scales(model: nn.Module, optim: Optim) -> dict[str, float]:
    """Share of the learning rate by parameter name: the tower's, times layer_decay for each layer above it."""
    towers = {"image": optim.image_lr, "text": optim.text_lr, "head": 1.0}
    scales = {name: towers[DualEncoder.tower_of(name)] for name, _ in model.named_parameters()}
    if optim.layer_decay != 1:
        for tower in ("image", "text"):
            groups = _layers(model, tower, optim.layer_decay)
            for above, names in enumerate(reversed(groups)):
                for name in names:
                    scales[name] *= optim.layer_decay**above
    return scales


def _layers(model: nn.Module, tower: str, decay: float) -> freeze.Groups:
    """A tower's parameters, first layers first; a projection that belongs to no layer comes last."""
    find = freeze.image_groups if tower == "image" else freeze.text_groups
    try:
        groups = find(model)
    except (UserError, AttributeError):
        raise UserError(
            f"optim.layer_decay {decay}: the {tower} tower does not tell its layers; leave it at 1, or take another "
            "model"
        ) from None
    known = {name for group in groups for name in group}
    rest = [n for n, _ in model.named_parameters() if DualEncoder.tower_of(n) == tower and n not in known]
    return [*groups, rest] if rest else groups


def _hidden_matrices(model: nn.Module, spared: set[str]) -> set[str]:
    """Names of decayed matrices [out, in] inside numbered layers: no embeddings, no projections out of a tower."""
    tables = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }
    found = {
        name
        for name, param in model.named_parameters()
        if param.ndim == 2
        and name not in spared | tables
        and re.search(r"\.\d+\.", name)
        and not name.startswith(("visual.head.", "text.proj."))
    }
    if not any(param.requires_grad for name, param in model.named_parameters() if name in found):
        raise UserError("optim.name muon: the towers train no matrices inside layers; take adamw, or another model")
    return found
