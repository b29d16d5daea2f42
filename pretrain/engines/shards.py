"""Tensors that are spread over ranks: whole ones from shards and shards of whole ones, norms and clipping over shards.

A tensor that is no DTensor is taken for what it is: the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as DCP's planner does

from pretrain.values import GradNorms


def is_spread(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors themselves where none is spread. Else whole ones on rank 0's CPU, and {} on other ranks. Collective.

    One tensor is gathered at a time, so that a rank needs the memory of its shards and of the largest one.
    """
    if not any(map(is_spread, named.values())):
        return dict(named)
    keeps, found = dist.get_rank() == 0, {}
    for name, tensor in named.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keeps:
            found[name] = full.detach().cpu()
    return found


@torch.no_grad()
def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, laid out as `like` is (then a copy); no communication."""
    if not isinstance(like, DTensor):
        return value
    part = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return DTensor.from_local(
        part.to(like.to_local().device, copy=True),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def read_like(values: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor laid out as `like` is; of values that can be read in part, only this rank's part is read.

    Args:
        values: whole tensors by name, or a mapping with the methods `part` and `shape` besides, such as
            `checkpoints.tensors.Stored`.
    """
    if not isinstance(like, DTensor) or not hasattr(values, "part"):
        return spread_like(values[name], like)
    size, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    own = like.to_local()
    empty = torch.empty(own.shape, dtype=values.dtype(name))  # type: ignore[attr-defined]
    part = values.part(name, offset, size) if own.numel() else empty
    how: dict[str, Any] = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part.to(own.device), like.device_mesh, like.placements, **how)


def shape_of(values: Mapping[str, Tensor], name: str) -> torch.Size:
    """Shape of a whole tensor; see `read_like`."""
    return values.shape(name) if hasattr(values, "shape") else values[name].shape


@torch.no_grad()
def fill_from_main(target: Tensor, value: Tensor | None) -> None:
    """Rank 0's whole tensor into a tensor of the same shape, spread or not, on every rank. Collective.

    Args:
        value: on rank 0, on any device; None elsewhere.
    """
    mesh = target.device_mesh if isinstance(target, DTensor) else None
    device = target.device if mesh is None else torch.device(mesh.device_type)
    sent = torch.empty(target.shape, dtype=target.dtype, device=device) if value is None else value.to(device)
    if isinstance(target, DTensor):
        spread = distribute_tensor(sent.detach(), target.device_mesh, target.placements, src_data_rank=0)
        target.to_local().copy_(spread.to_local())
    else:
        sent = sent.detach().contiguous()
        dist.broadcast(sent, src=0)
        target.copy_(sent)


@torch.no_grad()
def grad_norms(
    model: nn.Module, tower_of: Callable[[str], str], group: ProcessGroup, device: torch.device
) -> GradNorms:
    """What `optim.grad_norms` gives, of gradients whose parts lie on the ranks of `group`; one small all-reduce.

    Args:
        tower_of: 'image', 'text' or something else (counts in the total only) for a parameter's name.
        group: the ranks that hold one whole model.
        device: where norms are wanted; gradients may be on the CPU.
    """
    places = {"image": 0, "text": 1}
    dtype = torch.float32
    parts: dict[tuple[int, bool], list[Tensor]] = {}
    for name, param in model.named_parameters():
        if param.grad is not None:
            grad = local(param.grad)
            dtype = torch.promote_types(dtype, grad.dtype)
            parts.setdefault((places.get(tower_of(name), 2), is_spread(param.grad)), []).append(grad)
    squares = {spread: torch.zeros(3, dtype=dtype, device=device) for spread in (True, False)}
    for (place, spread), grads in parts.items():
        norms = torch._foreach_norm([grad.to(dtype) for grad in grads])
        squares[spread][place] = torch.stack(list(norms)).square().sum().to(device)
    dist.all_reduce(squares[True], group=group)
    total = squares[True] + squares[False]
    return GradNorms(total.sum().sqrt(), total[0].sqrt(), total[1].sqrt())


@torch.no_grad()
def clip(model: nn.Module, norms: GradNorms, max_norm: float) -> None:
    """Scale all gradients, parts or whole, by min(1, max_norm / total norm), without waiting for the device."""
    grads = [local(param.grad) for param in model.parameters() if param.grad is not None]
    factor = torch.clamp(max_norm / (norms.total + 1e-6), max=1.0)  # as torch.nn.utils.clip_grads_with_norm_ has it
    for device in {grad.device for grad in grads}:
        torch._foreach_mul_([grad for grad in grads if grad.device == device], factor.to(device))


def apart(optimizer: torch.optim.Optimizer) -> None:
    """Give spread and whole parameters groups of their own: one kernel over a group takes tensors of one kind."""
    for group in list(optimizer.param_groups):
        rest = [param for param in group["params"] if not is_spread(param)]
        if rest and len(rest) < len(group["params"]):
            group["params"] = [param for param in group["params"] if is_spread(param)]
            optimizer.add_param_group({**group, "params": rest})
