"""One sweep over the columns, gradients included: their upstream factor is one scalar, so backward only multiplies.

S = scale rows columns^T + bias;  loss = sum softplus(S_ij) off the pairs, softplus(-S_ii) on them;
dS_ij = sigmoid(S_ij) off the pairs, -sigmoid(-S_ii) on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.kernels.columns import Block, Columns, Pending
from pretrain.kernels.dispatch import device_of
from pretrain.kernels.pairing import Duplicates, Pairing
from pretrain.kernels.tiling import wide


class Swept(NamedTuple):
    """What a block of columns contributes."""

    total: Tensor
    """[] nats"""
    bias: Tensor | None
    """[] gradient"""
    columns: Tensor | None
    """[M, D] gradient, still to be multiplied by scale."""


class Needs(NamedTuple):
    """Which gradients are asked for."""

    rows: bool
    columns: bool
    scale: bool
    bias: bool


class Found(NamedTuple):
    """A whole sweep: the loss [], and its gradients as far as they are needed, of rows and columns still unscaled."""

    total: Tensor
    rows: Tensor | None
    columns: Pending | None
    bias: Tensor | None


@dataclass(frozen=True)
class Sweep:
    """One batch of rows against all columns."""

    rows: Tensor
    columns: Columns
    scale: Tensor
    bias: Tensor
    duplicates: Duplicates
    row_ids: Tensor | None
    column_ids: Tensor | None
    """[N]"""
    form: ModuleType
    """blockwise, reference or kernel."""
    gradient_dtype: torch.dtype | None = None
    """Of the gradient's matrix products; None for the features'."""

    def run(self, needs: Needs) -> Found:
        """Loss and gradients. The scale takes its own from either side, so rows are enough for it."""
        with device_of(self.rows):
            return self._run(needs)

    def _run(self, needs: Needs) -> Found:
        by_rows = needs.rows or (needs.scale and not needs.columns)
        d_rows = torch.zeros_like(wide(self.rows)) if by_rows else None
        parts: list[Swept] = []

        def share(block: Block) -> Tensor:
            given = (self.rows, block.columns, wide(self.scale), wide(self.bias), self._pairing(block))
            swept: Swept = self.form.sweep(*given, d_rows, needs.columns, needs.bias, self.gradient_dtype)
            parts.append(swept._replace(columns=None))
            return swept.columns if swept.columns is not None else swept.total

        pending = self.columns.collect(share) if needs.columns else None
        if pending is None:
            for block in self.columns.blocks():
                share(block)
        d_bias = torch.stack([part.bias for part in parts if part.bias is not None]).sum() if needs.bias else None
        return Found(torch.stack([part.total for part in parts]).sum(), d_rows, pending, d_bias)

    def _pairing(self, block: Block) -> Pairing:
        if self.duplicates == "negatives" or self.column_ids is None:
            return Pairing(block.span)
        return Pairing(block.span, self.duplicates, self.row_ids, self.column_ids[block.numbers])
