"""What an exchange promises, and the arithmetic that every one of them shares.

The contract: an objective returns the mean over this rank's rows; the exchange's backward returns each column's
gradient, summed over ranks, to its owner; the engine averages over ranks. Then W ranks equal one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Some of the N columns, all of one exchange step."""

    columns: Tensor
    """[M, D], M a multiple of B; differentiable, its gradient goes back to the owners."""
    start: int
    """Number of the first of these columns among the N."""


class Exchange(Protocol):
    """A way to the columns of all ranks, in rank order: columns[rank * B + i] is the partner of this rank's row i."""

    rank: int
    size: int

    def blocks(self, columns: Tensor) -> Iterator[Block]:
        """Every rank's [B, D] columns, piece by piece, each column exactly once. Every rank must walk to the end."""
        ...

    def gather(self, columns: Tensor) -> Tensor:
        """[B, ...] of every rank as [N, ...]; differentiable: each owner receives the sum of the gradients of its part.

        For small things (ids, weights) and objectives that need the whole matrix.
        """
        ...

    def sum(self, partial: Tensor) -> Tensor:
        """Sum over ranks of same-shaped tensors; differentiable: every rank receives the sum of the gradients."""
        ...

    def max(self, value: Tensor) -> Tensor:
        """Largest over ranks, elementwise; no gradient."""
        ...
