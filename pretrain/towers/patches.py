"""Patch dropout: training sees a random part of each image's patches. Source: Li et al. 2022, FLIP (arXiv:2212.00794).

It belongs to a run and not to the architecture: checkpoints and exports describe towers without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pretrain import config
from pretrain.compat import Towers
from pretrain.errors import UserError


def dropped(towers: dict[str, Any], share: float) -> dict[str, Any]:
    """open_clip's model_cfg with so large a share of the patches dropped; 0 leaves what it says."""
    return {**towers, "vision_cfg": towers["vision_cfg"] | {"patch_dropout": share}} if share else towers


def refuse_missing(towers: Towers, model: config.Model) -> None:
    """UserError where patches are to be dropped and the image tower, as built, drops none."""
    if not model.patch_dropout or any(_drops(module) for module in towers.visual.modules()):
        return
    kind = type(getattr(towers.visual, "trunk", towers.visual)).__name__
    raise UserError(
        f"model.patch_dropout {model.patch_dropout}: the image tower ({kind}) of model.name {model.name} has no "
        "patches to drop; set it to 0"
    )


def refuse_unknown(error: Exception, vision: Mapping[str, Any], name: str) -> None:
    """UserError where a tower cannot be built because its class, a convolutional one mostly, takes no patch dropout."""
    if (share := vision.get("patch_dropout")) and "patch_drop" in str(error):
        raise UserError(
            f"model.patch_dropout {share}: the image tower ({vision.get('timm_model_name', 'open_clip')}) of "
            f"model.name {name} has no patches to drop; set it to 0"
        ) from error


def _drops(module: nn.Module) -> bool:
    return type(module).__name__.startswith("PatchDropout") and float(getattr(module, "prob", 0.0)) > 0
