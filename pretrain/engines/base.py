"""What an engine promises: to average gradients over ranks, step the optimizer, and hand its state over by name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from pretrain.values import Announce, Batch, Features, GradNorms
from pretrain.world import World


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

    def step(self, lr: float, clip_norm: float | None) -> GradNorms:
        """Clip, update, clear the gradients, keep the logit scale within its bounds.

        Args:
            lr: learning rate of this step.
            clip_norm: largest Euclidean norm of the averaged gradient; None: no clipping.

        Returns:
            Norms before clipping.
        """
        ...

    def model_state(self) -> dict[str, Tensor]:
        """Every parameter and buffer, whole, by its name in the unwrapped model. Collective.

        Ranks other than 0 may get nothing, where nothing is whole on them.
        """
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer moments as 'MOMENT/PARAMETER' (for instance exp_avg/visual.proj), whole, and step counts.

        Collective, and on other ranks than 0 as `model_state` is.
        """
        ...

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Take back what `model_state` and `optimizer_state` gave, at any world size."""
        ...
