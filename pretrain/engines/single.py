"""One process: nothing is spread."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain import config, optim
from pretrain.engines.base import Judge
from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.values import Announce, Batch, Features, GradNorms
from pretrain.world import World

log = logging.getLogger(__name__)


class Single:
    """See `base.Engine`."""

    worlds = range(1, 2)
    """World sizes that this engine can carry."""

    def __init__(
        self,
        model: DualEncoder,
        options: config.Optim,
        world: World,
        parallel: config.Parallel | None = None,
    ) -> None:
        if world.size not in self.worlds:
            carries = "1 rank" if self.worlds.stop == 2 else f"at least {self.worlds.start} ranks"
            name = type(self).__name__.lower()
            raise UserError(f"engine {name} carries {carries}, not {world.size}: set engine: auto")
        self.world = world
        self.model = model
        self.parallel = parallel or config.Parallel()
        self.wrapped = self.wrap(model)
        self.optimizer = self.build_optimizer(options)

    def wrap(self, model: DualEncoder) -> nn.Module:
        """The module whose forward is called in training; it gives `Features.tensors()`."""
        return Named(model)

    def build_optimizer(self, options: config.Optim) -> torch.optim.Optimizer:
        """Over the parameters as `wrap` has left them."""
        return optim.build(self.model.towers, options)

    def forward(self, batch: Batch, announce: Announce | None = None) -> Features:
        return Features.of(self.wrapped(batch.images, batch.texts, announce, batch.for_towers))

    @contextmanager
    def averaging(self, on: bool) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self, lr: float, clip_norm: float | None, judge: Judge | None = None) -> GradNorms:
        norms = self.grad_norms()
        keep = judge(norms) if judge else None
        if clip_norm is not None:
            self.clip(norms, clip_norm)
        optim.set_rate(self.optimizer, lr)
        optim.step_if(self.optimizer, keep)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp()
        return norms

    def grad_norms(self) -> GradNorms:
        """Of the averaged gradients now in place."""
        return optim.grad_norms(self.model.towers, self.model.tower_of)

    def clip(self, norms: GradNorms, max_norm: float) -> None:
        """Scale the gradients down to a norm, given the one they have."""
        optim.clip(self.model.towers, norms, max_norm)

    def model_state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.towers.state_dict().items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        return optim.moments(self.optimizer, self.model.towers)

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.model.towers.load_state_dict(model)
        optim.load_moments(self.optimizer, self.model.towers, optimizer)


class Named(nn.Module):
    """A dual encoder that gives its features by name: wrappers look for tensors in dictionaries, not in our classes."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, texts: Tensor, announce: Announce | None, further: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """`DualEncoder.forward`, as `Features.tensors()`."""
        features: Features = self.model(images, texts, announce, further)
        return features.tensors()


def warn_of_batch_norms(model: DualEncoder) -> None:
    """Say that results depend on the number of ranks, where they do."""
    if model.has_batch_norms:
        log.warning("the towers have BatchNorm, which normalises over each rank's rows: results depend on the ranks")
