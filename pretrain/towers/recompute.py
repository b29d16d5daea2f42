"""Gradient checkpointing of the towers' blocks, or a clear refusal: never a knob that a tower quietly ignores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.compat import Towers
from pretrain.errors import UserError
from pretrain.speed.options import Checkpointing
from pretrain.towers import blocks
from pretrain.towers.forward import replace_forward

_DEAR = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
         "_scaled_dot_product_cudnn_attention")  # fmt: skip
"""Operators whose results `selective` keeps: most of the time, little of the memory."""
DEAR = frozenset(getattr(torch.ops.aten, name).default for name in _DEAR if hasattr(torch.ops.aten, name))


def enable(towers: Towers, how: Checkpointing) -> None:
    """Compute activations of both towers' blocks again in the backward pass.

    Args:
        towers: open_clip's CLIP or CustomTextCLIP, locked already where the config locks it, not compiled yet.
        how: which blocks, and what of them is kept. Source: Chen et al. 2016 (arXiv:1604.06174).

    Raises:
        UserError: a tower has no repeated blocks, or batch norms that a second forward would update twice.
    """
    for tower, roots in blocks.parts(towers).items() if how.every else ():
        found = [block for root in roots for block in blocks.blocks(root)]
        _refuse(tower, _kind(towers, tower), roots, found)
        for block in found[:: how.every]:
            replace_forward(block, _recomputed(block.forward, how.selective))


def _recomputed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    kept: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kept, **kwargs)

    return call


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def _refuse(tower: str, kind: str, roots: list[nn.Module], found: list[nn.Module]) -> None:
    modules = [module for root in roots for module in root.modules()]
    if any(getattr(module, "running_mean", None) is not None and _trains(module) for module in modules):
        raise UserError(
            f"model.grad_checkpointing: the {tower} tower ({kind}) has batch norms, whose running statistics a "
            f"recomputed forward would update twice; turn it off, lock the tower, or take another model"
        )
    if not found:
        raise UserError(
            f"model.grad_checkpointing: the {tower} tower ({kind}) has no repeated blocks to compute again; turn it "
            f"off or take another model"
        )


def _kind(towers: Towers, tower: str) -> str:
    module = towers.visual if tower == "image" else getattr(towers, "text", towers)
    return type(getattr(module, "trunk", module)).__name__


def _trains(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return not own or any(parameter.requires_grad for parameter in own)
