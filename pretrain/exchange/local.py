"""One rank: its columns are all columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pretrain.exchange.base import Exchange
from pretrain.exchange.transport import Transport
from pretrain.exchange.trip import Options, Trip
from pretrain.kernels.columns import Block, Ready, Share
from pretrain.kernels.pairing import Span


@dataclass
class Stay(Trip):
    """Nothing travels."""

    def blocks(self) -> Iterator[Block]:
        yield Block(self.mine, slice(0, self.count), Span(0, 0, self.count))

    def collect(self, share: Share) -> Ready:
        return Ready(share(next(self.blocks())))

    def spread(self, values: Tensor) -> Tensor:
        return values

    def sum(self, partial: Tensor) -> Tensor:
        return partial

    def max(self, value: Tensor) -> Tensor:
        return value


class Local(Exchange):
    """The exchange of a run on one rank."""

    trip = Stay

    def __init__(self, transport: Transport, options: Options | None = None) -> None:
        """Raises ValueError for more than one rank: each would see its own negatives only."""
        super().__init__(transport, options)
        if self.size != 1:
            raise ValueError(f"exchange local serves one rank, not rank {self.rank} of {self.size}")
