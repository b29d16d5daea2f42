"""Muon for the matrices inside the towers' layers, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon over the groups with `hidden: True`, torch's AdamW over the others; both see the same groups.

    Muon's update is scaled to the size of AdamW's, so that one rate and one decay serve both (Liu et al. 2025,
    arXiv:2502.16982); its momentum is Jordan's 0.95. Attention's joint matrix of queries, keys and values is one.

    Source: Jordan et al. 2024, Muon (https://kellerjordan.github.io/posts/muon).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool | None,
    ) -> None:
        self._options: dict[str, Any] = {"betas": betas, "eps": eps, "fused": fused}
        super().__init__(groups, {"lr": lr})
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both; no closure."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure: call backward() first")
        for part in self._parts:
            part.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group, of either kind."""
        super().add_param_group(param_group)
        if hasattr(self, "_parts"):
            self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        """Give both parts this optimizer's own groups and state, not copies."""
        rate = self.defaults["lr"]
        matrices = [group for group in self.param_groups if group["hidden"]]
        others = [group for group in self.param_groups if not group["hidden"]]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=rate, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=rate, **self._options))
        for part in self._parts:
            part.state = self.state
