"""One rank: its columns are all columns."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from pretrain.exchange.base import Block


class Local:
    """The exchange of a run on one rank."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Raises ValueError for more than one rank: each would see its own negatives only."""
        if (rank, size) != (0, 1):
            raise ValueError(f"exchange local serves one rank, not rank {rank} of {size}")
        self.rank, self.size = rank, size

    def blocks(self, columns: Tensor) -> Iterator[Block]:
        yield Block(columns, 0)

    def gather(self, columns: Tensor) -> Tensor:
        return columns

    def sum(self, partial: Tensor) -> Tensor:
        return partial

    def max(self, value: Tensor) -> Tensor:
        return value.detach()
