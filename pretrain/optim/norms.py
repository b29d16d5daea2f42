"""Gradient norms by tower, and clipping by the total one; nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.values import GradNorms


@torch.no_grad()
def grad_norms(model: nn.Module, tower_of: Callable[[str], str]) -> GradNorms:
    """Euclidean norms of the gradients now in place, without waiting for the device.

    Args:
        tower_of: 'image', 'text' or something else (counts in the total only) for a parameter's name.

    Returns:
        [] on the model's device, at least fp32.
    """
    towers: dict[str, list[Tensor]] = {"image": [], "text": []}
    device = torch.device("cpu")
    for name, param in model.named_parameters():
        device = param.device
        if param.grad is not None:
            grad = param.grad.float() if param.grad.dtype.itemsize < 4 else param.grad
            towers.setdefault(tower_of(name), []).append(grad)
    norms = {key: _norm(grads, device) for key, grads in towers.items()}
    total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return GradNorms(total, norms["image"], norms["text"])


@torch.no_grad()
def clip(model: nn.Module, norms: GradNorms, max_norm: float) -> None:
    """Scale all gradients by min(1, max_norm / total norm), without waiting for the device.

    Args:
        norms: of these gradients, before clipping.
    """
    params = [param for param in model.parameters() if param.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norms.total)


def _norm(grads: list[Tensor], device: torch.device) -> Tensor:
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=device)
