"""One process: nothing is spread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain import config, optim
from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.values import Announce, Batch, Features, GradNorms
from pretrain.world import World


class Single:
    """See `base.Engine`."""

    worlds = range(1, 2)
    """World sizes that this engine can carry."""

    def __init__(self, model: DualEncoder, options: config.Optim, world: World) -> None:
        if world.size not in self.worlds:
            raise UserError(
                f"engine {type(self).__name__.lower()} carries {self.worlds} ranks, not {world.size}: set engine: auto"
            )
        self.world = world
        self.model = model
        self.optimizer = optim.build(model.towers, options)
        self.wrapped = self.wrap(model)

    def wrap(self, model: DualEncoder) -> nn.Module:
        """The module whose forward is called in training."""
        return model

    def forward(self, batch: Batch, announce: Announce | None = None) -> Features:
        features: Features = self.wrapped(batch.images, batch.texts, announce, batch.for_towers)
        return features

    @contextmanager
    def averaging(self, on: bool) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self, lr: float, clip_norm: float | None) -> GradNorms:
        norms = optim.grad_norms(self.model.towers, self.model.tower_of)
        if clip_norm is not None:
            optim.clip(self.model.towers, norms, clip_norm)
        optim.set_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp()
        return norms

    def model_state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.towers.state_dict().items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        return optim.moments(self.optimizer, self.model.towers)

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.model.towers.load_state_dict(model)
        optim.load_moments(self.optimizer, self.model.towers, optimizer)
