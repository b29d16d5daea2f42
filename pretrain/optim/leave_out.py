"""An optimizer step that may be left out, decided on the device where the optimizer can take that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reads_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer itself leaves a step out by a flag on the device: torch's fused AdamW, and nothing else.

    StableAdamW is one, but looks at its update again on the way back.
    """
    return type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, keep: Tensor | None) -> None:
    """Take a step, or leave weights, moments and step counts bit for bit as they are.

    Args:
        keep: [] bool on the device; None: take it. Optimizers that do not read it there wait for it on the host.
    """
    if keep is None:
        optimizer.step()
    elif reads_on_device(optimizer):
        _fused_step(optimizer, (~keep).to(torch.float32))
    elif bool(keep):
        optimizer.step()


def _fused_step(optimizer: Any, left_out: Tensor) -> None:
    optimizer.found_inf = left_out  # where torch.amp.GradScaler puts its own
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf
