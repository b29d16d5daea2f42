"""The optimizer that a run names, over parameter groups, each with its own decay and share of the learning rate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain.compat import open_clip  # noqa: F401 - timm is only importable once torchvision's operators are declared
from pretrain.config import Optim
from pretrain.errors import UserError
from pretrain.optim.groups import Group, report, split
from pretrain.optim.leave_out import reads_on_device
from pretrain.optim.muon import MuonAdamW
from pretrain.optim.stable import StableAdamW

log = logging.getLogger(__name__)

Groups = list[dict[str, Any]]
"""Parameter groups, as torch's optimizers take them."""


def build(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters; its groups hold `weight_decay` and `lr_scale`.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, locked already where the config locks it.

    Raises:
        UserError: nothing is trainable, a knob does not fit the towers, or the optimizer's library is missing.
    """
    if not any(param.requires_grad for param in model.parameters()):
        raise UserError("model.lock_image, model.lock_text: every parameter is frozen; leave something to train")
    groups = split(model, optim)
    for line in report(groups, optim):
        log.info("%s", line)
    made = _MAKERS[optim.name]([_of_torch(group, optim) for group in groups], optim)
    if not reads_on_device(made) and any(param.is_cuda for param in model.parameters()):
        log.info("optim.name %s: whether a step is left out is read on the host, which waits for the GPU", optim.name)
    return made


def _of_torch(group: Group, optim: Optim) -> dict[str, Any]:
    values: dict[str, Any] = {"params": list(group.params.values()), "weight_decay": group.weight_decay}
    values |= {"lr": optim.lr * group.lr_scale, "lr_scale": group.lr_scale}
    return values | ({"hidden": group.hidden} if optim.name == "muon" else {})


def _fused(groups: Groups) -> bool | None:
    # One kernel for all of an update: on a CPU five times the speed of the default.
    devices = {param.device.type for group in groups for param in group["params"]}
    return True if devices <= {"cuda", "cpu"} else None


def _adamw(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=_fused(groups))


def _stable_adamw(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    return StableAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=_fused(groups))


def _lion(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    from timm.optim.lion import Lion

    made: torch.optim.Optimizer = Lion(groups, lr=optim.lr, betas=optim.betas)
    return made


def _lamb(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    from timm.optim.lamb import Lamb

    # It would clip the gradient to norm 1 by itself; optim.clip_norm says whether anything does.
    made: torch.optim.Optimizer = Lamb(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, max_grad_norm=None)
    return made


def _muon(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    return MuonAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=_fused(groups))


def _adamw8bit(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optim.name adamw8bit needs bitsandbytes, which is not installed: pip install 'pretrain[bitsandbytes]', or "
            "take adamw"
        ) from error
    make: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return make(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)


_MAKERS: dict[str, Callable[[Groups, Optim], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "stable_adamw": _stable_adamw,
    "lion": _lion,
    "lamb": _lamb,
    "muon": _muon,
    "adamw8bit": _adamw8bit,
}
