"""In which arithmetic a run's loss is computed, and on which way its features reach the other ranks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist

from pretrain import exchange
from pretrain.config import Run
from pretrain.errors import UserError
from pretrain.exchange import Exchange, Load, Options
from pretrain.kernels.dispatch import require
from pretrain.world import World

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "mixed": torch.float16}


def open_exchange(run: Run, world: World, width: int) -> Exchange:
    """The exchange of a run, in a process group of its own so that its messages wait for nobody else's. Collective.

    Args:
        width: D.

    Raises:
        UserError: there is none of this name, or it cannot serve these ranks.
    """
    how, rows = options(run, world.device), run.train.global_batch // world.size
    try:
        require(how.impl, torch.empty(0, dtype=how.products or torch.float32, device=world.device))
    except ValueError as error:
        raise UserError(f"loss.kernel {run.loss.kernel}: {error}") from None
    load = Load(rows, width, run.loss.memory_gb * 2**30, on_gpu=world.device.type == "cuda")
    group = own_group(world) if world.size > 1 else None
    return exchange.make(run.exchange, world.rank, world.size, how, group, load)


def options(run: Run, device: torch.device) -> Options:
    """What the `loss` section says, for tensors on a device."""
    precision, loss = run.loss.precision, run.loss
    if precision == "auto":
        precision = "fp16" if run.model.precision == "bf16" and device.type == "cuda" else "fp32"
    return Options(
        products=None if precision == "fp32" else DTYPES[precision],
        gradients=torch.bfloat16 if precision == "mixed" else None,
        impl=loss.kernel,
        accumulators=torch.bfloat16 if loss.accumulators == "bf16" else None,
        slices=loss.slices,
        node_size=loss.node_size,
    )


def own_group(world: World) -> dist.ProcessGroup:
    """A process group of all ranks; on GPUs connected at once, because a first message that connects one pair of ranks
    only is a way into a deadlock."""
    eager: dict[str, Any] = {}
    if world.device.type == "cuda" and "device_id" in inspect.signature(dist.new_group).parameters:
        eager["device_id"] = world.device
    return world.new_group(**eager)
