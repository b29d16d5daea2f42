"""AdamW whose update is clipped, tensor by tensor, where the second moment lags behind the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StableAdamW(torch.optim.AdamW):
    """AdamW with the rate of every tensor divided by max(1, RMS), RMS^2 = mean(g^2 / max(v, eps^2)).

    v is the second moment with this step's gradient in it, corrected for its start at zero. Gradients that outgrow
    their own history then move the weights by no more than usual: loss spikes of CLIP training start there.

    AdamW's step, decay included, is linear in the rate: the whole step is taken, and the weights go back the part of
    the way that was too much. A copy of the weights lives as long as the step. Nothing waits for the device.

    Source: Wortsman et al. 2023 (arXiv:2304.13013), algorithm 2.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; `closure` is not taken, since the gradients must be known before it."""
        if closure is not None:
            raise ValueError("StableAdamW takes no closure: call backward() first")
        held = [
            (group, param, param.detach().clone())
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        super().step()
        for group, param, before in held:
            # With a share of 1 this is the new weight, bit for bit.
            param.copy_(before.lerp_(param.detach(), self._share(param, param.grad, group)))

    def _share(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """[] in (0, 1]: how much of the step that AdamW has just taken this tensor should have taken."""
        state = self.state[param]
        # In fp64, as AdamW itself counts: 1 - beta^steps cancels.
        start = 1 - group["betas"][1] ** state["step"].to(grad.device, torch.float64)
        second = (state["exp_avg_sq"] / start).clamp_(min=group["eps"] ** 2)
        rms: Tensor = grad.square().div_(second).mean().sqrt()
        return rms.clamp(min=1.0).reciprocal().to(param.dtype)
