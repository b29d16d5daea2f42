"""What an engine promises: to average gradients over ranks, step the optimizer, and hand its state over by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from pretrain.values import Announce, Batch, Features, GradNorms
from pretrain.world import World

Judge = Callable[[GradNorms], Tensor]
"""Norms before clipping -> [] bool on their device, the same on every rank: whether to update the weights."""


class Engine(Protocol):
    """A dual encoder and its optimizer, carried by one process or many. It knows nothing of losses."""

    world: World

    def forward(self, batch: Batch, announce: Announce | None = None) -> Features:
        """Features of this rank's rows, further views and captions among them, through whatever wraps the model.

        Args:
            announce: called with the text features before the image tower starts; what it returns takes their place.
        """
        ...

    def averaging(self, on: bool) -> AbstractContextManager[None]:
        """Around forward and backward: whether that backward averages gradients over ranks (the last part's does)."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar to the parameters."""
        ...

    def step(self, lr: float, clip_norm: float | None, judge: Judge | None = None) -> GradNorms:
        """Clip, update, clear the gradients, keep the logit scale within its bounds.

        Args:
            lr: learning rate of this step.
            clip_norm: largest Euclidean norm of the averaged gradient; None: no clipping.
            judge: may leave the update out. Collective. Weights, moments and step counts then stay bit for bit as they
                are, without a wait for the device where `optim.reads_on_device`.

        Returns:
            Norms before clipping.
        """
        ...

    def model_state(self) -> Mapping[str, Tensor]:
        """Every parameter and buffer by its name in the unwrapped model; the tensors themselves. Collective.

        On each rank whole tensors, or DTensors of which it holds a part; or whole ones on rank 0 and nothing on the
        others. `shards.whole` makes whole ones of them all.
        """
        ...

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """Optimizer moments as 'MOMENT/PARAMETER' (for instance exp_avg/visual.proj), and step counts.

        Spread over ranks, and collective, as `model_state` is.
        """
        ...

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take back what `model_state` and `optimizer_state` gave, at any world size, here or in another engine.

        Args:
            model, optimizer: whole tensors on every rank; or, of a checkpoint, read when asked for, whole or in part.
        """
        ...
