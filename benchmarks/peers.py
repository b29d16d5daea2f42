"""The losses that are compared, each as a function of the same features: ours, and what others have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.inf_cl import inf_cl_loss
from benchmarks.measure import unit_rows
from pretrain.compat import open_clip
from pretrain.losses import ClipLoss, SigLipLoss
from pretrain.plan.loss import Loss

Side = Literal["ours", "open_clip_eager", "open_clip_compiled", "materialised", "inf_cl"]
LossFunction = Callable[..., Tensor]
LOGITS_BYTES: dict[Side, int] = {
    "ours": 0,
    "open_clip_eager": 16,
    "open_clip_compiled": 8,
    "materialised": 12,
    "inf_cl": 0,
}
"""Memory per logit that a side is expected to need at most: decides whether it is tried at all."""
FP16_FACTOR = 65536.0
COMPILED_SIZES = (8192, 32768)
"""Compiling takes seconds for each."""


@dataclass(frozen=True)
class Case:
    """What is measured at once."""

    loss: Loss
    size: int
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.loss} B={self.size} d={self.width} {str(self.dtype).removeprefix('torch.')}"

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Image and text features, scale, and bias where there is one; leaves that collect gradients."""
        image, text = (
            unit_rows(self.size, self.width, device, self.dtype, seed).requires_grad_()
            for seed in (2 * self.size, 2 * self.size + 1)
        )
        scale = torch.tensor(14.3 if self.loss == "clip" else 10.0, device=device, requires_grad=True)
        bias = (torch.tensor(-10.0, device=device, requires_grad=True),) if self.loss == "siglip" else ()
        return (image, text, scale, *bias)


def sides(case: Case, device: torch.device) -> dict[Side, LossFunction]:
    """Everything that can be measured in a case. On a GPU the others run under autocast, as their trainers do it."""
    clip = case.loss == "clip"
    theirs = _autocast(open_clip.ClipLoss() if clip else open_clip.loss.SigLipLoss(), device, case.dtype)
    fair = _autocast(materialised_clip if clip else materialised_siglip, device, case.dtype)
    found: dict[Side, LossFunction] = {"ours": ClipLoss() if clip else SigLipLoss(), "open_clip_eager": theirs}
    if device.type != "cuda":
        found["materialised"] = fair
    elif case.size in COMPILED_SIZES and case.width == 512 and case.dtype == torch.bfloat16:
        torch.compiler.reset()  # or the limit on recompilations would turn a later size into eager code, quietly
        found |= {"open_clip_compiled": torch.compile(theirs, dynamic=False)}
        found |= {"materialised": torch.compile(fair, dynamic=False)}
    return found | ({"inf_cl": inf_cl_loss} if clip else {})


def compiled(side: Side, device: torch.device) -> bool:
    """Whether a side is compiled before it first runs."""
    return device.type == "cuda" and side in ("open_clip_compiled", "materialised")


def _autocast(loss: LossFunction | nn.Module, device: torch.device, dtype: torch.dtype) -> LossFunction:
    if device.type != "cuda":
        return loss

    def call(*tensors: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype):
            return loss(*tensors)

    return call


def materialised_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """What a careful author would write without a kernel: the logits once, both cross-entropies from them."""
    logits = scale * (image @ text.T)
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def materialised_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same for SigLIP: softplus of every logit, less the pairs' logits. No labels."""
    logits = (scale * (image @ text.T) + bias).to(torch.promote_types(image.dtype, torch.float32))
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(image)


def forward(loss: LossFunction, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        loss(*tensors)


def forward_backward(loss: LossFunction, tensors: Sequence[Tensor]) -> None:
    loss(*tensors).backward()
    for tensor in tensors:
        tensor.grad = None


def errors(case: Case, loss: LossFunction, device: torch.device) -> dict[str, float]:
    """Relative errors of the loss and of every gradient against fp64 on the same rounded features."""
    exact = materialised_clip if case.loss == "clip" else materialised_siglip
    inputs = case.inputs(device)
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    names = ("image", "text", "scale", "bias")
    wanted = (exact(*wide), *_gradients(exact, wide))
    found = (loss(*inputs), *_gradients(loss, inputs))
    pairs = zip(("loss", *(f"d_{name}" for name in names)), found, wanted, strict=False)
    return {name: float((one.double() - other).norm().detach() / other.norm().detach()) for name, one, other in pairs}


def _gradients(loss: LossFunction, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In fp64; made of a loss scaled as a trainer does it in fp16, where small gradients would vanish."""
    factor = FP16_FACTOR if tensors[0].dtype == torch.float16 else 1.0
    found = torch.autograd.grad(factor * loss(*tensors), tensors)
    return tuple(gradient.double() / factor for gradient in found)
