"""What a config's towers cost, by running them once on tensors without data: no GPU, no weights, no formulas by hand.

The model is built as a run builds it, its weights are replaced by fake ones, and every operator of a forward and a
backward pass is watched at two batch sizes. Attention goes through the fused kernel's operator, and where a GPU is
meant, norms are taken in fp32 as its autocast does. Needs torch, unlike the rest of `pretrain.plan`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain import config, objectives, precision
from pretrain.data.wanted import of_objectives
from pretrain.errors import UserError
from pretrain.model import DualEncoder, build
from pretrain.plan.towers import Sizes
from pretrain.plan.watch import Watch
from pretrain.plan.work import Highest, Linear, Spent, Tower, Work
from pretrain.towers import blocks

ROWS = (2, 4)
"""Batch sizes of the two passes: one row would take ways of its own."""
PEAKS_AT = [2**n for n in range(18)]
UNTRACED = ("compile", "compile=max-autotune", "cuda_graphs", "short_texts")
Device = Literal["gpu", "cpu"]
Name = Literal["image", "text"]


def trace(run: config.Run, device: Device = "gpu") -> Work:
    """Both towers of a run.

    Args:
        run: of its knobs, those of the model count, and what its objectives need.
        device: whose autocast is meant.

    Raises:
        UserError: the model does not exist, or a tower looks at data that is not there.
    """
    model = _built(run, run.model.grad_checkpointing)
    plain = model if run.model.grad_checkpointing == "off" else _built(run, "off")
    image, text = _tower("image", model, plain, device), _tower("text", model, plain, device)
    return Work(image, text, sizes_of(model.towers), **_fed(run, model))


def sizes_of(towers: nn.Module) -> Sizes:
    """Numbers in every tensor of a model, by the blocks that are gathered on their own."""
    found = [block for unit in blocks.units(towers) for block in unit.blocks]
    inside = {id(param) for block in found for param in block.parameters()}
    rest = tuple(param.numel() for param in towers.parameters() if id(param) not in inside)
    return Sizes(rest, tuple(tuple(param.numel() for param in block.parameters()) for block in found))


def _built(run: config.Run, checkpointing: str) -> DualEncoder:
    """The model as shapes, without what changes how kernels are made and not what they do."""
    entries = tuple(entry for entry in run.model.speed if entry not in UNTRACED)
    model = replace(run.model, speed=entries, grad_checkpointing=checkpointing, pretrained=None)
    chosen = [objectives.find(choice.name)(choice.options) for choice in run.objective]
    return build(model, chosen, run.seed, torch.device("meta")).train()


def _fed(run: config.Run, model: DualEncoder) -> dict[str, Any]:
    wanted = of_objectives([objectives.find(choice.name)(choice.options) for choice in run.objective])
    images, texts = 1 + wanted.image_views, 1 + wanted.text_views + wanted.captions
    height, width = model.image_spec.size
    left_out = tuple(f"model.speed {entry}" for entry in run.model.speed if entry in UNTRACED)
    return {
        "width": int(model.architecture.towers["embed_dim"]),
        "pair_bytes": images * 3 * height * width + texts * 8 * _length(model),
        "image_rows": images,
        "text_rows": texts,
        "assumed": left_out,
    }


def _length(model: DualEncoder) -> int:
    return int(model.towers.context_length)


def _tower(name: Name, model: DualEncoder, plain: DualEncoder, device: Device) -> Tower:
    one, two = (_Seen.of(name, model, rows, device) for rows in ROWS)
    bare = one if plain is model else _Seen.of(name, plain, ROWS[0], device)
    flops = [sum(spent[:2]) / ROWS[0] for spent in (bare.forward, bare.whole)]
    forward, whole = Spent(*map(_line, one.forward, two.forward)), Spent(*map(_line, one.whole, two.whole))
    peaks = map(_highest, one.levels, two.levels)
    parameters = sum(p.numel() for n, p in model.towers.named_parameters() if model.tower_of(n) == name)
    return Tower(name, parameters, (flops[0], flops[1] - flops[0]), forward, whole, _line(one.saved, two.saved), *peaks)


def _line(one: float, two: float) -> Linear:
    per_row = (two - one) / (ROWS[1] - ROWS[0])
    return Linear(one - per_row * ROWS[0], per_row)


def _highest(one: list[int], two: list[int]) -> Highest:
    """Moments of two passes are the same: memory at each is linear in the rows, and those that ever are a peak stay."""
    if len(one) != len(two):  # a kernel that depends on the rows: the two peaks must do
        return Highest((_line(max(one), max(two)),))
    lines = dict.fromkeys(map(_line, one, two))
    return Highest(tuple(dict.fromkeys(max(lines, key=lambda line: line.at(rows)) for rows in PEAKS_AT)))


@dataclass(frozen=True)
class _Seen:
    """One tower at one batch size."""

    forward: tuple[int, int, int, int]
    whole: tuple[int, int, int, int]
    saved: int
    levels: tuple[list[int], ...]
    """Bytes over a pass: forward, forward without gradients, backward, and backward with gradients of weights."""

    @staticmethod
    def of(name: Name, model: DualEncoder, rows: int, device: Device) -> _Seen:
        try:
            gc.collect()
            gc.disable()  # what it frees, and when, would differ between two passes
            with FakeTensorMode(allow_non_fake_inputs=True), _weights(model.towers), _kernels(model, device):
                return _seen(name, model, rows)
        except UserError:
            raise
        except Exception as error:
            kind, said = type(error).__name__, " ".join(str(error).split())[:200]
            raise UserError(
                f"model.name {model.architecture.name}: the {name} tower cannot be planned, since it does not run "
                f"without data ({kind}: {said})"
            ) from error
        finally:
            gc.enable()


def _seen(name: Name, model: DualEncoder, rows: int) -> _Seen:
    with torch.no_grad(), Watch() as alone:
        _features(name, model, rows)
    params = list(model.towers.parameters())
    with Watch() as watch:
        features = _features(name, model, rows)
        between, forward = watch.now, _spent(watch)
        if features.requires_grad:
            torch.autograd.backward(features, torch.empty_like(features))
        grads = [param.grad for param in params if param.grad is not None]
        backward = [watch.levels(between, watch.now, without) for without in (grads, [])]
        levels = watch.levels(0, between), alone.levels(0, alone.now), *backward
        return _Seen(forward, _spent(watch), watch.held(between), levels)


def _spent(watch: Watch) -> tuple[int, int, int, int]:
    return watch.products, watch.attention, watch.moved, watch.calls


def _features(name: Name, model: DualEncoder, rows: int) -> Tensor:
    """[rows, D] of unit norm, as `DualEncoder.encode_image` and `encode_text` make them."""
    towers = model.towers
    with precision.towers(model.precision, torch.device("cpu")):
        if name == "text":
            features = towers.encode_text(torch.zeros(rows, _length(model), dtype=torch.int64))
        else:
            dtype = torch.bfloat16 if model.precision == "bf16" else torch.float32
            pixels = torch.empty(rows, 3, *model.image_spec.size, dtype=dtype)
            features = towers.encode_image(pixels.contiguous(memory_format=model.ways.pixels))
    pooled = features[0] if isinstance(features, tuple) else features
    return F.normalize(pooled.float(), dim=-1)


@contextmanager
def _weights(towers: nn.Module) -> Iterator[None]:
    """Fake weights and buffers on the CPU in place of shapes on the meta device; entered inside the fake mode."""
    made: dict[int, Any] = {}
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in towers.modules()]
    for module, parameters, buffers in before:
        module._parameters.update(
            {name: made.setdefault(id(param), _like(param)) for name, param in parameters.items()}
        )
        module._buffers.update({name: made.setdefault(id(buffer), _like(buffer)) for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _like(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def _kernels(model: DualEncoder, device: Device) -> Iterator[None]:
    """Norms as a GPU's autocast takes them: on fp32 copies of their inputs."""
    if device == "cpu" or model.precision == "fp32":
        yield
        return
    kept = F.layer_norm, F.group_norm
    F.layer_norm, F.group_norm = (_in_fp32(one) for one in kept)
    try:
        yield
    finally:
        F.layer_norm, F.group_norm = kept


def _in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return norm(values.float(), *args, **kwargs)

    return call
