"""Whether a step may move the weights: decided on the device from its loss and gradient norm, alike on every rank.

Sources: the rule of mean and standard deviations over a window of steps, of loss and gradient norm, is OLMo 2's
(Team OLMo 2024, arXiv:2501.00656, SkipStepOptimizer); that spikes begin with single batches is PaLM's finding
(Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.values import GradNorms
from pretrain.world import World

WINDOW = 128
"""Steps that were taken, on which the limits rest; and steps among which those left out are counted."""
WARM_UP = 32
"""Steps that must have been taken before spikes are judged; what is not finite is left out from the first step on."""
_LEAST_SPREAD = 1e-3
"""Standard deviation that is always granted, as a share of the mean: rounding is no spike."""


@dataclass(frozen=True)
class Verdict:
    """What was found of one step; the same on every rank."""

    loss: float
    """Mean over ranks."""
    grad_norm: float
    max_loss: float
    """What the loss might have been; infinite where only finiteness was asked for."""
    max_grad_norm: float

    @property
    def reason(self) -> str | None:
        """Why the step was left out; None: it was taken."""
        if not math.isfinite(self.loss):
            return "the loss is not finite"
        if not math.isfinite(self.grad_norm):
            return "the gradient is not finite"
        if self.loss > self.max_loss:
            return "the loss spikes"
        return "the gradient spikes" if self.grad_norm > self.max_grad_norm else None


class Judge:
    """Keeps the last losses and gradient norms on the device, and never waits for it but in `verdicts`."""

    def __init__(self, spikes: float | None, world: World) -> None:
        """
        Args:
            spikes: standard deviations above the mean that are a spike; None: nothing finite is one.
        """
        self._spikes, self._world = spikes, world
        self._taken = torch.zeros(2, WINDOW, dtype=torch.float64, device=world.device)
        self._count = torch.zeros((), dtype=torch.int64, device=world.device)
        self._places = torch.arange(WINDOW, device=world.device)
        self._unread: list[Tensor] = []

    @property
    def unread(self) -> int:
        """Steps judged since `verdicts` was last called."""
        return len(self._unread)

    def of(self, loss: Tensor) -> Callable[[GradNorms], Tensor]:
        """The judge of a step with this rank's loss []: takes the gradient's norms, gives [] bool, whether to step."""
        return partial(self._judge, loss)

    def verdicts(self) -> list[Verdict]:
        """Of the steps since the last call, in order. One copy to the host."""
        unread, self._unread = self._unread, []
        return [Verdict(*row) for row in torch.stack(unread).tolist()] if unread else []

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, for `load`; all verdicts are read."""
        assert not self._unread, "verdicts that nobody has read would be lost"
        return {"taken": self._taken, "count": self._count}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self._taken.copy_(state["taken"])
        self._count.copy_(state["count"])
        self._unread = []

    @torch.no_grad()
    def _judge(self, loss: Tensor, norms: GradNorms) -> Tensor:
        found = torch.stack([loss.detach().double(), norms.total.double()]).to(self._taken.device)
        if self._world.size > 1:  # both: a rank whose norm differs must still decide as the others do
            dist.all_reduce(found)
            found /= self._world.size
        limits = self._limits()
        keep = (found.isfinite() & (found <= limits)).all()
        self._unread.append(torch.cat([found, limits]))
        here = (self._places == self._count % WINDOW) & keep
        self._taken = torch.where(here, found[:, None], self._taken)
        self._count = self._count + keep
        return keep

    def _limits(self) -> Tensor:
        """[2]: the largest loss and gradient norm that are no spike."""
        if self._spikes is None:
            return self._taken.new_full((2,), math.inf)
        filled = (self._places < self._count).double()
        mean = (self._taken * filled).sum(1) / filled.sum().clamp(min=1)
        spread = (((self._taken - mean[:, None]).square() * filled).sum(1) / filled.sum().clamp(min=1)).sqrt()
        limits = mean + self._spikes * torch.maximum(spread, _LEAST_SPREAD * mean.abs())
        return torch.where(self._count >= WARM_UP, limits, math.inf)
