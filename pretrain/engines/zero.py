"""Where ZeRO keeps a parameter's master weights, moments and averaged gradient: this rank's part, and wholes of them.

Stages 1 and 2 lay the parameters of a group end to end and cut the line into one piece a rank; stage 3 cuts each
parameter. Either way a rank's part of a parameter is a stretch of a flat fp32 tensor, by which the optimizer knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.values import GradNorms


@dataclass(frozen=True)
class Place:
    """This rank's stretch of a parameter."""

    param: nn.Parameter
    shape: torch.Size
    """Of the whole parameter, whose own tensor is empty at stage 3."""
    flat: Tensor
    """[n] fp32 master weights among which the stretch lies; the optimizer's state is kept under it."""
    start: int
    """Where the stretch starts in `flat`..."""
    offset: int
    """...and in the flattened parameter."""
    size: int
    """Its length; 0 where other ranks hold the whole parameter."""

    def of(self, flat: Tensor) -> Tensor:
        """The stretch of `flat` or of a moment that is laid out like it, sharing memory."""
        return flat.narrow(0, self.start, self.size)

    def cut(self, whole: Tensor) -> Tensor:
        """The stretch of a whole tensor of the parameter's shape."""
        return whole.reshape(-1).narrow(0, self.offset, self.size)

    def join(self, part: Tensor, device: torch.device) -> Tensor:
        """The whole tensor of which each rank has its stretch, [*shape] on every rank. Collective."""
        whole = torch.zeros(self.shape.numel(), dtype=part.dtype, device=device)
        whole.narrow(0, self.offset, self.size).copy_(part)
        dist.all_reduce(whole)  # every number is given by one rank and is 0 on the others: exact
        return whole.view(self.shape)


class Places:
    """The trainable parameters of a model that DeepSpeed's ZeRO carries, by name."""

    def __init__(
        self, zero: Any, stage: int, model: nn.Module, shapes: Mapping[str, torch.Size], device: torch.device
    ) -> None:
        """
        Args:
            zero: DeepSpeed's optimizer of stage 1, 2 or 3, not its engine.
            shapes: of the whole parameters.
            device: of the ranks' collectives; with offload, parts are on the CPU.
        """
        self.zero, self.stage, self.device = zero, stage, device
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        groups = {} if stage == 3 else {id(p): i for i, group in enumerate(zero.bit16_groups) for p in group}
        self.named: dict[str, Place] = {
            name: self._sliced(param, shapes[name]) if stage == 3 else self._cut(param, shapes[name], groups[id(param)])
            for name, param in named.items()
        }
        """By the name in the model."""

    def _cut(self, param: Any, shape: torch.Size, group: int) -> Place:
        flat, mapping = self.zero.single_partition_of_fp32_groups[group], param._hp_mapping
        if mapping is None:
            return Place(param, shape, flat, 0, 0, 0)
        master, weights = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Place(param, shape, flat, master.start, weights.start, master.numel)

    def _sliced(self, param: Any, shape: torch.Size) -> Place:
        group, start, size = self.zero.grad_position[self.zero.get_param_id(param)]
        offset = min(size * dist.get_rank(), param.ds_numel)  # the last ranks' slices may be padded, or padding alone
        size = min(size, param.ds_numel - offset)
        return Place(param, shape, self.zero.fp32_partitioned_groups_flat[group], start, offset, size)

    def gradient(self, place: Place) -> Tensor | None:
        """This rank's stretch of the averaged gradient, between the last backward and the step; None: it has none."""
        param: Any = place.param
        if not place.size:
            return None
        if self.stage == 3:
            grad: Tensor = param._z3_optimizer.get_local_fp32_grad_for_param(param)
        else:
            grad = param._hp_mapping.get_lp_grad_fragment(param._index_in_param_group)
        return grad.reshape(-1).narrow(0, 0, place.size)

    @torch.no_grad()
    def grad_norms(self, model: DualEncoder) -> GradNorms:
        """What `optim.grad_norms` gives; one small all-reduce."""
        squares = torch.zeros(3, device=self.device)
        towers: dict[int, list[Tensor]] = {}
        for name, place in self.named.items():
            if (grad := self.gradient(place)) is not None:
                tower = {"image": 0, "text": 1}.get(model.tower_of(name), 2)
                towers.setdefault(tower, []).append(grad.float())
        for tower, grads in towers.items():
            squares[tower] = torch.stack(list(torch._foreach_norm(grads))).square().sum()
        dist.all_reduce(squares)
        return GradNorms(squares.sum().sqrt(), squares[0].sqrt(), squares[1].sqrt())

    @torch.no_grad()
    def break_gradients(self) -> None:
        """Make this rank's gradients no numbers: ZeRO then leaves the step out, on every rank."""
        for place in self.named.values():
            if (grad := self.gradient(place)) is not None:
                grad.fill_(torch.nan)
        if getattr(self.zero, "norm_for_param_grads", None):  # with offload: it looked in the backward pass
            self.zero.local_overflow = True
            for norm in self.zero.norm_for_param_grads.values():
                norm.fill_(torch.nan)

    @torch.no_grad()
    def forget_gradients(self) -> None:
        """Clear what DeepSpeed 0.19 leaves behind a step, and adds to where a parameter sits out a backward pass."""
        left = [getattr(self.zero, "grad_partitions_flat_buffer", None)]
        left += list(getattr(self.zero, "accumulated_grads_in_cpu", {}).values())
        left += [place.flat.grad for place in self.named.values()]
        for buffer in {id(tensor): tensor for tensor in left if tensor is not None}.values():
            buffer.zero_()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every trainable parameter's master weights, whole. Collective."""
        for name, place in self.named.items():
            yield name, place.join(place.of(place.flat.detach()), self.device)

    @torch.no_grad()
    def load_weights(self, named: Mapping[str, Tensor]) -> None:
        """Whole tensors, the same on every rank, into the master weights."""
        for name, place in self.named.items():
            place.of(place.flat.data).copy_(place.cut(named[name]))

    def moments(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state as 'MOMENT/PARAMETER', whole, with step counts. Collective."""
        for name, place in self.named.items():
            for key, value in optimizer.state.get(place.flat, {}).items():
                if value.shape == place.flat.shape:
                    yield f"{key}/{name}", place.join(place.of(value), self.device)
                else:
                    yield f"{key}/{name}", value.clone()

    @torch.no_grad()
    def load_moments(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        """Take back what `moments` gave, here or in another engine.

        Raises:
            UserError: a moment belongs to no trainable parameter, has another shape, or a count that ZeRO cannot keep.
        """
        optimizer.state.clear()
        for key, value in state.items():
            moment, name = key.split("/", 1)
            if name not in self.named:
                raise UserError(
                    f"optimizer state {key}: the model has no such trainable parameter; resume with its config"
                )
            place = self.named[name]
            held = optimizer.state[place.flat]
            if value.shape == place.shape and moment != "step":
                place.of(held.setdefault(moment, torch.zeros_like(place.flat.data))).copy_(place.cut(value))
            elif moment != "step":
                raise UserError(
                    f"optimizer state {key}: shape {list(value.shape)}, parameter {list(place.shape)}; resume with the "
                    "config that saved it"
                )
            elif float(held.setdefault(moment, _count(value, place.flat, optimizer))) != float(value):
                raise UserError(
                    f"optimizer state {key}: {float(value):g} steps, other parameters {float(held[moment]):g}: ZeRO "
                    "keeps one count for many parameters and would lose this one; go on under engine ddp or fsdp2"
                )


class ShardedAverage:
    """`ema.Average` of weights that stage 3 spreads over ranks: each rank averages its own stretches."""

    def __init__(self, places: Places, model: nn.Module, decay: float) -> None:
        self.decay, self._places = decay, places
        self._parts = {n: p.of(p.flat.data).to(torch.float32, copy=True) for n, p in places.named.items()}
        self._buffers = {name: buffer.detach().clone() for name, buffer in saved_buffers(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights in; call it after each optimizer step."""
        places = self._places.named
        weights = [places[name].of(places[name].flat.data) for name in self._parts]
        torch._foreach_lerp_(list(self._parts.values()), weights, 1 - self.decay)
        for name, buffer in saved_buffers(model).items():
            self._buffers[name].copy_(buffer)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter and buffer name, whole, on rank 0's CPU; {} on the others. Collective."""
        places = self._places.named
        wholes = ((name, places[name].join(part, self._places.device)) for name, part in self._parts.items())
        return on_main(wholes, dict(self._buffers))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, the same on every rank.

        Raises:
            UserError: names or shapes are not those of this model.
        """
        own = self._parts.keys() | self._buffers.keys()
        if wrong := sorted(own ^ state.keys()):
            raise UserError(
                f"averaged weights do not fit the model: {wrong[0]} and {len(wrong) - 1} more; keep the config"
            )
        for name, part in self._parts.items():
            place = self._places.named[name]
            value = state[name]
            if value.shape != place.shape:
                raise UserError(f"averaged weight {name}: shape {list(value.shape)}, model {list(place.shape)}")
            part.copy_(place.cut(value))
        for name, buffer in self._buffers.items():
            buffer.copy_(state[name])


def on_main(wholes: Iterator[tuple[str, Tensor]], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a collective gives one by one, with what needs none, on rank 0's CPU; {} on the others."""
    keeps, found = dist.get_rank() == 0, {}
    for name, value in wholes:
        if keeps:
            found[name] = value.detach().cpu()
    return found | {name: value.detach() for name, value in others.items()} if keeps else {}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a checkpoint."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _count(value: Tensor, flat: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    # A fused kernel reads step counts on the device, the others on the CPU.
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return value.detach().to(flat.device if fused else "cpu", copy=True)
