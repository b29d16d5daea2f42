"""How the columns of a contrastive loss come to its rows: all at once, or in blocks that somebody else brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.kernels.pairing import Span


@dataclass(frozen=True)
class Block:
    """Some of the N columns, there at one moment. Its memory may be used again once the next block is asked for."""

    columns: Tensor
    """[M, D]"""
    numbers: slice | Tensor
    """Which of the N columns these are: a slice, or [M] int64."""
    span: Span
    """Which of them are the partners of which rows."""


Share = Callable[[Block], Tensor]
"""A block -> what these rows add to the gradient of its columns, [M, D] fp32 (fp64 for fp64), in fresh memory."""


class Pending(Protocol):
    """A gradient that may still be under way."""

    def take(self, factor: Tensor, keep: bool = False) -> Tensor:
        """[B, D] times a scalar, the caller's own; the only copy, unless it is kept for being taken again."""
        ...


class Columns(Protocol):
    """N columns, of which B are the partners of the B rows here. A kernel sees nothing else of the world.

    Everyone who holds rows must make the same calls in the same order, and must walk to the end.
    """

    count: int
    """N"""

    def blocks(self) -> Iterator[Block]:
        """Every column exactly once, without gradient."""
        ...

    def collect(self, share: Share) -> Pending:
        """Every column exactly once; the sum of all shares of the B partners' gradients comes back."""
        ...

    def own(self, values: Tensor) -> Tensor:
        """[N, ...] -> [B, ...]: the partners' part."""
        ...

    def spread(self, values: Tensor) -> Tensor:
        """[B, ...] -> [N, ...]: a value of each partner, told to all rows. No gradient."""
        ...

    def sum(self, partial: Tensor) -> Tensor:
        """Sum of every row holder's tensor of one shape. No gradient."""
        ...

    def max(self, value: Tensor) -> Tensor:
        """Elementwise largest of them. No gradient."""
        ...


@dataclass(frozen=True)
class Ready:
    """A gradient that is there."""

    gradient: Tensor

    def take(self, factor: Tensor, keep: bool = False) -> Tensor:
        return self.gradient * factor if keep else self.gradient.mul_(factor)


class Here:
    """Columns that are all here, `columns[offset + i]` being the partner of row i: nobody else is asked."""

    def __init__(self, columns: Tensor, rows: int, offset: int = 0) -> None:
        self._columns, self.count = columns.detach(), len(columns)
        self._span = Span.at(offset, rows, len(columns))
        self._partners = slice(self._span.column, self._span.column + self._span.count)

    def blocks(self) -> Iterator[Block]:
        yield Block(self._columns, slice(0, self.count), self._span)

    def collect(self, share: Share) -> Ready:
        return Ready(share(next(self.blocks())))

    def own(self, values: Tensor) -> Tensor:
        return values[self._partners]

    def spread(self, values: Tensor) -> Tensor:
        spread = torch.zeros(self.count, *values.shape[1:], dtype=values.dtype, device=values.device)
        spread[self._partners] = values
        return spread

    def sum(self, partial: Tensor) -> Tensor:
        return partial

    def max(self, value: Tensor) -> Tensor:
        return value
