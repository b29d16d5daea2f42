"""Optimizer state by parameter name: 'MOMENT/PARAMETER', for every optimizer that `build` makes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import UserError

_UNSHAPED = re.compile(r"step|absmax\d|qmap\d")
"""Moments that do not have their parameter's shape: counts, and the scales and code books of 8-bit moments."""


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as 'MOMENT/PARAMETER' (exp_avg, exp_avg_sq, step); the tensors themselves, not copies.

    What an optimizer keeps once for many parameters (LAMB's step, 8-bit code books) is written for each of them; what
    it keeps as a Python number, as int64. Parameters that were never updated have none.
    """
    counts = {id(p): group["step"] for group in optimizer.param_groups if "step" in group for p in group["params"]}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, param in model.named_parameters():
        values = dict(optimizer.state.get(param, {}))
        if values and id(param) in counts:
            values["step"] = counts[id(param)]
        for moment, value in values.items():
            found[f"{moment}/{name}"] = _tensor(value, shared=id(value) in seen)
            seen.add(id(value))
    return found


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
        if not _UNSHAPED.fullmatch(moment) and value.shape != params[name].shape:
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
    if _counts_by_group(optimizer):
        _restore_counts(optimizer)


def _counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps are counted once for a group, as timm's LAMB does."""
    return type(optimizer).__name__ == "Lamb"


def _restore_counts(optimizer: torch.optim.Optimizer) -> None:
    """Move the step count from the parameters to their group."""
    for group in optimizer.param_groups:
        group.pop("step", None)
        for param in group["params"]:
            if (count := optimizer.state.get(param, {}).pop("step", None)) is not None:
                group["step"] = count


def _tensor(value: Any, shared: bool) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.int64)
    return value.detach().clone() if shared else value.detach()


def _placed(value: Tensor, moment: str, param: Tensor, step_on_device: bool) -> Tensor | int:
    if moment == "step" and value.dtype == torch.int64:
        return int(value)
    # AdamW keeps step counts on the CPU, as fp32, unless its kernel reads them on the device.
    device = torch.device("cpu") if moment == "step" and not step_on_device else param.device
    return value.detach().to(device, copy=True)
