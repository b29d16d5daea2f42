"""Weights, gradients and moments are spread over ranks; a block's weights are whole only while it computes.

Source: PyTorch's fully_shard; Zhao et al. 2023 (arXiv:2304.11277), Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from pretrain import config
from pretrain.engines import shards
from pretrain.engines.single import Named, Single, warn_of_batch_norms
from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.towers import blocks
from pretrain.values import GradNorms
from pretrain.world import World

log = logging.getLogger("pretrain")


class Fsdp2(Single):
    """See `base.Engine`.

    Scale and bias are whole on every rank, in full precision: they belong to the loss, and are averaged here.
    """

    worlds = range(2, 1 << 20)
    mesh: DeviceMesh
    """[replicas, ranks that share a replica]."""

    @staticmethod
    def starts_on(world: World) -> torch.device:
        """Rank 0 builds the model on its CPU, the others only its shapes: one whole model, not one for each rank."""
        return torch.device("cpu" if world.is_main else "meta")

    def wrap(self, model: DualEncoder) -> nn.Module:
        self._averages, self.mesh = True, _mesh(self.world, self.parallel.replicas)
        refuse_tied(model.towers)
        warn_of_batch_norms(model)
        values = _tensors(model.towers) if self.world.is_main else {}
        model.to("meta")
        named = self._spread(model)
        named.to_empty(device="cpu" if self.parallel.offload else self.world.device)
        self._keep_near(model.towers)
        for name, target in _tensors(model.towers).items():
            shards.fill_from_main(target, values.pop(name, None))
        return named

    def build_optimizer(self, options: config.Optim) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(options)
        shards.apart(optimizer)
        return optimizer

    @contextmanager
    def averaging(self, on: bool) -> Iterator[None]:
        self._synchronise(on)
        try:
            yield
        finally:
            self._synchronise(True)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)
        if self._averages:
            self._average_head()

    def grad_norms(self) -> GradNorms:
        group = self.mesh.get_group(self.mesh.ndim - 1)
        return shards.grad_norms(self.model.towers, self.model.tower_of, group, self.world.device)

    def clip(self, norms: GradNorms, max_norm: float) -> None:
        shards.clip(self.model.towers, norms, max_norm)

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        params = dict(self.model.towers.named_parameters())
        moments = {key: _moment_like(optimizer, key, params.get(key.split("/", 1)[1])) for key in optimizer}
        super().load({name: shards.read_like(model, name, like) for name, like in self._matched(model)}, moments)

    def _spread(self, model: DualEncoder) -> nn.Module:
        """Blocks, then what is left of each tower, then what is left of all but scale and bias."""
        named = Named(model)
        narrow = torch.bfloat16 if self.parallel.gather_dtype == "bf16" else None
        reduce = torch.bfloat16 if self.parallel.reduce_dtype == "bf16" else None
        policy = MixedPrecisionPolicy(reduce_dtype=reduce)
        block_policy = MixedPrecisionPolicy(narrow, reduce or (torch.float32 if narrow else None))
        how: dict[str, Any] = {"mesh": self.mesh, "offload_policy": self._offload()}
        for unit in blocks.units(model.towers):
            if self.world.is_main:
                (log.info if unit.blocks else log.warning)("engine fsdp2: %s", unit)
            for block in unit.blocks:
                fully_shard(block, mp_policy=block_policy, reshard_after_forward=self.parallel.reshard, **how)
            for rest in unit.whole:
                if rest not in unit.blocks:
                    fully_shard(rest, mp_policy=policy, reshard_after_forward=self.parallel.reshard, **how)
        ignored = set(self._head(model).values())
        fully_shard(named, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored, **how)
        return named

    def _offload(self) -> OffloadPolicy:
        return (
            CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda") if self.parallel.offload else OffloadPolicy()
        )

    def _keep_near(self, towers: nn.Module) -> None:
        """Buffers, scale and bias where the arithmetic is, whatever is offloaded."""
        for module in towers.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.world.device))
        for head in self._head(self.model).values():
            head.data = head.data.to(self.world.device)

    def _synchronise(self, on: bool) -> None:
        assert isinstance(self.wrapped, FSDPModule)
        self._averages = on
        self.wrapped.set_requires_gradient_sync(on)

    def _average_head(self) -> None:
        grads = [head.grad for head in self._head(self.model).values() if head.grad is not None]
        if grads:
            mean = torch.stack([grad.reshape(()) for grad in grads])
            dist.all_reduce(mean)
            for grad, value in zip(grads, mean / self.world.size, strict=True):
                grad.copy_(value.reshape(grad.shape))

    def _matched(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        own = self.model.towers.state_dict()
        if wrong := sorted(own.keys() ^ state.keys()):
            raise UserError(f"weights do not fit the model: {wrong[0]} and {len(wrong) - 1} more; keep the config")
        yield from own.items()

    @staticmethod
    def _head(model: DualEncoder) -> dict[str, nn.Parameter]:
        return {name: p for name, p in model.towers.named_parameters() if model.tower_of(name) == "head"}


def _mesh(world: World, replicas: int) -> DeviceMesh:
    """Neighbouring ranks share a replica: those of a node, where the fastest links are."""
    kind = world.device.type
    if replicas == 1:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shards",))
    if world.size % replicas or replicas == world.size:
        fits = [str(n) for n in range(1, world.size) if world.size % n == 0]
        raise UserError(
            f"parallel.replicas {replicas} does not leave {world.size} ranks at least two to a replica: take one of "
            f"{', '.join(fits)}, or engine ddp for a whole model on every rank"
        )
    return _grid(world, torch.arange(world.size, dtype=torch.int).reshape(replicas, -1))


def _grid(world: World, ranks: Tensor) -> DeviceMesh:
    """A mesh [replicas, ranks of one] over groups that wait as long as the world does: a mesh's own ones would not."""
    groups: list[dist.ProcessGroup] = []
    for rows in (ranks.T.tolist(), ranks.tolist()):
        made = [world.new_group(row) for row in rows]
        groups.append(next(group for group, row in zip(made, rows, strict=True) if world.rank in row))
    return DeviceMesh.from_group(groups, world.device.type, ranks, mesh_dim_names=("replicas", "shards"))


def refuse_tied(towers: nn.Module) -> None:
    """Refuse parameters that two modules share: each would be cut up, sent and updated on its own."""
    names: dict[int, str] = {}
    for name, param in towers.named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(param), name)) != name:
            raise UserError(f"engine fsdp2: {first} and {name} of the model are one parameter; take engine ddp")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, saved or not, each once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _moment_like(values: Mapping[str, Tensor], key: str, param: Tensor | None) -> Tensor:
    if param is None or shards.shape_of(values, key) != param.shape:
        return values[key]
    return shards.read_like(values, key, param)
