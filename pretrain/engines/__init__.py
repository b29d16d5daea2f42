"""How parameters, gradients and optimizer state are spread. The file name is the name in the config."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from pretrain import named
from pretrain.config import Optim, Parallel
from pretrain.engines.base import Engine
from pretrain.model import DualEncoder
from pretrain.world import World

Make = Callable[[DualEncoder, Optim, World, Parallel], Engine]


def names() -> list[str]:
    """Every built-in engine."""
    return named.names(sys.modules[__name__])


def find(name: str, world_size: int) -> Make:
    """The engine class of a file; 'auto' is single for one process and ddp for more. UserError where there is none."""
    automatic = "single" if world_size == 1 else "ddp"
    return named.find(sys.modules[__name__], automatic if name == "auto" else name, Engine)


def starts_on(name: str, world: World) -> torch.device:
    """Where this rank builds the model that an engine takes: the rank's device, unless the engine says otherwise."""
    says: Callable[[World], torch.device] | None = getattr(find(name, world.size), "starts_on", None)
    return world.device if says is None else says(world)
