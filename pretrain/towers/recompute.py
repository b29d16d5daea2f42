"""Gradient checkpointing of the towers, or a clear refusal: never a flag that a tower quietly ignores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from pretrain.compat import Towers
from pretrain.errors import UserError

_FLAGS = ("grad_checkpointing", "gradient_checkpointing")
"""What open_clip and timm, and transformers, call the switch inside their towers."""


def enable(towers: Towers) -> None:
    """Recompute the activations of both towers' layers in the backward pass.

    Args:
        towers: open_clip's CLIP or CustomTextCLIP, locked already where the config locks it.

    Raises:
        UserError: a tower cannot do it, or has batch norms that a second forward would update twice.
    """
    _switch("image", towers.visual, _image_switch(towers.visual))
    text: Any = getattr(towers, "text", towers)
    _switch("text", text.transformer, _text_switch(text))


def _image_switch(visual: Any) -> Callable[[], object]:
    # open_clip's timm adapter turns a failure into a log line; asking the trunk itself keeps it a failure.
    tower = getattr(visual, "trunk", visual)
    return lambda: tower.set_grad_checkpointing(True)


def _text_switch(text: Any) -> Callable[[], object]:
    transformer = text.transformer
    # transformers 5 renames it. The reentrant kind loses all gradients where the embeddings below it are frozen.
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(transformer, name):
            return partial(getattr(transformer, name), {"use_reentrant": False})
    return lambda: setattr(transformer, "grad_checkpointing", True)


def _switch(name: str, tower: nn.Module, switch: Callable[[], object]) -> None:
    kind = type(getattr(tower, "trunk", tower)).__name__
    refusal = (
        f"model.grad_checkpointing: the {name} tower ({kind}) does not support it; turn it off or take another model"
    )
    if any(getattr(module, "running_mean", None) is not None and _trains(module) for module in tower.modules()):
        raise UserError(
            f"model.grad_checkpointing: the {name} tower ({kind}) has batch norms, whose running statistics a "
            f"recomputed forward would update twice; turn it off, lock the tower, or take another model"
        )
    try:
        switch()
    except (AttributeError, AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(refusal) from error
    if not any(getattr(module, flag, False) is True for module in tower.modules() for flag in _FLAGS):
        raise UserError(refusal)


def _trains(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return not own or any(parameter.requires_grad for parameter in own)
