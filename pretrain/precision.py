"""In which arithmetic the towers run, and where full precision is kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16"]


def towers(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Arithmetic of the towers: bf16 matrix products under autocast (weights stay fp32), or plain fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else full_precision(device)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """An island inside which autocast changes nothing: for norms, scale and loss."""
    # A device without autocast (meta) computes as it is told anyway.
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def at_least_fp32(values: Tensor) -> Tensor:
    """The same values as fp32, or as fp64 where they are fp64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
