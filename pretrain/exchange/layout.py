"""Who owns which columns, and how the ranks agree on it before anything large is sent."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pretrain.exchange.transport import Transport

MESSAGE = 400
"""Bytes of a problem that are told to the other ranks."""
DTYPES = ("another", "float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Layout:
    """Who owns which of the N columns: rank 0 the first counts[0], and so on."""

    counts: tuple[int, ...]
    rank: int
    room: int = 0
    """Rows that every rank sends, where that is more than any has."""

    @property
    def starts(self) -> list[int]:
        """Number of each rank's first column; last, N."""
        return [0, *accumulate(self.counts)]

    @property
    def total(self) -> int:
        """N"""
        return sum(self.counts)

    @property
    def most(self) -> int:
        """Rows that every rank sends: ranks with fewer fill up."""
        return max(self.room, *self.counts)

    @property
    def own(self) -> slice:
        """This rank's columns among the N."""
        return self.of(self.rank)

    def of(self, rank: int) -> slice:
        """A rank's columns among the N."""
        return slice(self.starts[rank], self.starts[rank + 1])

    @property
    def even(self) -> bool:
        """Whether no rank fills up."""
        return all(count == self.most for count in self.counts)

    def between(self, first: int, last: int) -> Layout:
        """Who owns which columns of a slice: rows [first, last) of every rank, which fills up what it lacks."""
        counts = tuple(max(0, min(count, last) - first) for count in self.counts)
        return Layout(counts, self.rank, last - first)

    def among(self, first: int, last: int, rank: int) -> Layout:
        """Who owns which columns of ranks [first, last), of which this one counts as `rank`."""
        return Layout(self.counts[first:last], rank, self.most)

    def filled(self, rows: Tensor) -> Tensor:
        """[b, ...] -> [most, ...], zeros below; contiguous."""
        if len(rows) == self.most:
            return rows.contiguous()
        return torch.cat([rows, rows.new_zeros(self.most - len(rows), *rows.shape[1:])])

    def packed(self, gathered: Tensor) -> Tensor:
        """[W * most, ...] -> [N, ...]: without what ranks filled up."""
        if self.even:
            return gathered
        parts = gathered.view(len(self.counts), self.most, *gathered.shape[1:])
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def unpacked(self, values: Tensor) -> Tensor:
        """[N, ...] -> [W * most, ...], the reverse, contiguous."""
        if self.even:
            return values.contiguous()
        return torch.cat([self.filled(part) for part in torch.split(values, list(self.counts))])


def code(dtype: torch.dtype) -> int:
    """A dtype as a number that is the same on every rank."""
    name = str(dtype).removeprefix("torch.")
    return DTYPES.index(name) if name in DTYPES else 0


def compare(columns: Tensor, problem: str | None, transport: Transport) -> Layout:
    """The layout of a batch that all ranks found good; or ValueError, the same one on every rank, as `bring` says."""
    told = (problem or "").encode()[:MESSAGE]
    facts = [len(columns) if columns.ndim else 0, columns[:1].numel(), code(columns.dtype), len(told)]
    own = torch.tensor([*(n >> shift & 255 for n in facts for shift in range(0, 40, 8)), *told.ljust(MESSAGE)])
    own = own.to(torch.uint8).to(transport.talks_on)
    gathered = own.new_empty(transport.size * len(own))
    transport.all_gather(gathered, own).wait()
    found = [bytes(row) for row in gathered.view(transport.size, -1).tolist()]
    numbers = [[int.from_bytes(row[n : n + 5], "little") for n in range(0, 20, 5)] for row in found]
    rows, widths, codes, lengths = (list(column) for column in zip(*numbers, strict=True))
    for rank, (row, length) in enumerate(zip(found, lengths, strict=True)):
        if length:
            where = f"rank {rank}: " if transport.size > 1 else ""
            raise ValueError(where + row[20 : 20 + length].decode(errors="replace"))
    filled = {(width, kind) for count, width, kind in zip(rows, widths, codes, strict=True) if count}
    if len(filled) != 1:
        raise ValueError(
            "features must be of one width and dtype on every rank, with at least one row on one of them; "
            f"rows by rank: {rows}, widths: {widths}, dtypes: {', '.join(DTYPES[n] for n in codes)}"
        )
    return Layout(tuple(rows), transport.rank)
