"""Which form of a kernel runs: chosen once per call, said once per choice."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "blockwise", "reference"]
"""triton: fused GPU kernels; blockwise: torch in tiles; reference: the specification, which holds everything."""
Form = Literal["triton", "blockwise", "reference"]

log = logging.getLogger("pretrain.kernels")


def choose(kernel: str, impl: str, tensor: Tensor, *, low_precision_only: bool = False) -> Form:
    """The form that serves a tensor.

    Args:
        kernel: its name, for messages.
        impl: what the caller asked for; auto takes triton on CUDA where it is installed, else blockwise.
        tensor: whose device and dtype decide.
        low_precision_only: auto takes triton for fp16 and bf16 only, because the matrix units serve nothing else well.

    Raises:
        ValueError: there is no such form, or it cannot run on this device or dtype.
    """
    require(impl, tensor)
    if impl != "auto":
        return cast("Form", impl)
    form, reason = _automatic(tensor, low_precision_only)
    _say(kernel, form, reason)
    return form


def require(impl: str, tensor: Tensor) -> None:
    """Raise ValueError where there is no such form, or it cannot serve a tensor."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl {impl!r} must be one of {', '.join(get_args(Impl))}")
    if impl == "triton":
        _require_triton(tensor)


def _automatic(tensor: Tensor, low_precision_only: bool) -> tuple[Form, str]:
    device = tensor.device.type
    if device != "cuda":
        return "blockwise", f"features are on {device}"
    if not has_triton():
        return "blockwise", "triton is not installed"
    if tensor.dtype == torch.float64:
        return "blockwise", "fp64 has no fused form"
    if low_precision_only and tensor.dtype == torch.float32:
        return "blockwise", "fp32 products are not for the matrix units; fp16 or bf16 features would be"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "blockwise", "the GPU is older than compute capability 8.0"
    return "triton", f"features are {str(tensor.dtype).removeprefix('torch.')} on {device}"


def _require_triton(tensor: Tensor) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not has_triton():
        raise ValueError("impl 'triton' needs the package triton; install it, or take impl 'blockwise'")
    if tensor.device.type != "cuda" and not interpreted:
        raise ValueError(f"impl 'triton' needs CUDA tensors, not {tensor.device}; take impl 'blockwise'")
    if tensor.dtype == torch.float64:
        raise ValueError("impl 'triton' has no torch.float64; take impl 'blockwise'")
    if interpreted and tensor.dtype == torch.bfloat16:
        raise ValueError("triton's interpreter multiplies torch.bfloat16 wrongly; take impl 'blockwise'")


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's GPU the current one, which is where Triton launches; nothing where it is on the CPU."""
    guard: AbstractContextManager[Any] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return guard


@cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def _say(kernel: str, form: str, reason: str) -> None:
    log.info("%s runs its %s form: %s", kernel, form, reason)


def load(kernel: str, form: Form) -> ModuleType:
    """The module of a form; triton's is imported only here, once it is chosen."""
    file = {"triton": "kernel"}.get(form, form)
    return importlib.import_module(f"pretrain.kernels.{kernel}.{file}")
