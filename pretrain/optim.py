"""The optimizer, its schedules by samples seen, and gradient norms. State goes by parameter name, never by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pretrain.config import Optim
from pretrain.errors import UserError
from pretrain.values import GradNorms


def build(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters in two groups: with and without weight decay.

    Raises:
        UserError: nothing is trainable.
    """
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not trainable:
        raise UserError("model.lock_image, model.lock_text: every parameter is frozen; leave something to train")
    spared = undecayed(model)
    groups = [
        {"params": [p for n, p in trainable.items() if n in spared], "weight_decay": 0.0},
        {"params": [p for n, p in trainable.items() if n not in spared], "weight_decay": optim.weight_decay},
    ]
    # One kernel for all of an update: on a CPU five times the speed of the default.
    fused = all(param.device.type in ("cuda", "cpu") for param in trainable.values())
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None)


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


def learning_rate(optim: Optim, samples: int, total_samples: int, global_batch: int) -> float:
    """Learning rate of the step that takes samples [samples, samples + global_batch).

    Warm-up rises linearly and counts the step's own samples, so that the first step moves; cosine and decay go by the
    samples before the step. With warm-up in whole steps this is open_clip's rate at every step.

    Args:
        samples: pairs seen before the step.
        total_samples: length of the run.

    Raises:
        UserError: warm-up and decay are longer than the run.
    """
    warmup, decay = optim.warmup_samples, optim.decay_samples
    if warmup + decay > total_samples:
        raise UserError(
            f"optim.warmup_samples {warmup} + optim.decay_samples {decay} exceed the run's {total_samples} samples; "
            "shorten them or train longer"
        )
    if samples < warmup:
        return optim.lr * min(1.0, (samples + global_batch) / warmup)
    if optim.schedule == "constant":
        return optim.lr
    length = decay if optim.schedule == "wsd" else total_samples - warmup
    done = min(1.0, max(0.0, 1 - (total_samples - samples) / length)) if length else 1.0
    left = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.lr_end + left * (optim.lr - optim.lr_end)


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as 'MOMENT/PARAMETER' (exp_avg, exp_avg_sq, step); the tensors themselves, not copies.

    Parameters that were never updated have none.
    """
    return {
        f"{key}/{name}": value.detach()
        for name, param in model.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
    }


def load_moments(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take back what `moments` gave, whatever the order of groups and parameters.

    Raises:
        UserError: a moment belongs to no trainable parameter, or has another shape.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    loaded: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        moment, name = key.split("/", 1)
        if name not in params:
            raise UserError(f"optimizer state {key}: the model has no such trainable parameter; resume with its config")
        if moment != "step" and value.shape != params[name].shape:
            raise UserError(
                f"optimizer state {key}: shape {list(value.shape)}, parameter {list(params[name].shape)}; "
                "resume with the config that saved it"
            )
        loaded.setdefault(name, {})[moment] = value
    on_device = {id(p) for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
    optimizer.state.clear()
    for name, values in loaded.items():
        param = params[name]
        optimizer.state[param] = {
            moment: _placed(value, moment, param, id(param) in on_device) for moment, value in values.items()
        }


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


def _placed(value: Tensor, moment: str, param: Tensor, step_on_device: bool) -> Tensor:
    # AdamW keeps step counts on the CPU, as fp32, unless its kernel reads them on the device.
    device = torch.device("cpu") if moment == "step" and not step_on_device else param.device
    return value.detach().to(device, copy=True)
