"""Which sample comes when: pure functions of (seed, position), with no state to save and nothing to replay.

A run reads one endless stream. Position p lies in epoch p // n. Each epoch permutes the data set's chunks (a few
neighbouring samples, or whole shards), cuts the chunks into windows, and permutes the samples inside a window; so every
epoch holds every sample once, reads stay within a window's chunks, and any position is found without walking to it.
Several sources are mixed by weight: which source a position takes is one periodic table, made so that every stretch of
positions holds the exact shares; each source then has epochs of its own.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from pretrain.config import Data
from pretrain.data.draws import CHUNKS, DRAW, REPLACE, SHARDS, SOURCE, WINDOW, mix, sample_random, scatter, view_random
from pretrain.errors import UserError

__all__ = ["Mixture", "Order", "SampleOrder", "Sized", "mix", "of", "sample_random", "scatter", "shares", "view_random"]

_NEAR_ATTEMPTS = 8
"""Replacements are drawn from the sample's own window before they are drawn from anywhere: its shards are at hand."""
_MAX_PERIOD = 1 << 16
"""Positions after which the turns of mixed sources repeat, at most; finer shares are rounded to it."""
_EXCESS = 25
"""Same-shard pairs in a batch exceed a uniform shuffle's by at most 1 part in so many, where chunks are chosen here."""


class SampleOrder(Protocol):
    """Position in the endless stream -> sample number in the data set."""

    seed: int

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def number(self, position: int) -> int:
        """The sample at a position >= 0."""
        ...

    def replacement(self, position: int, attempt: int) -> int:
        """Which sample stands in for an unusable one, on the first, second, ... attempt."""
        ...


class Sized(Protocol):
    """What an order is made of; a `reader.Source` is one."""

    @property
    def counts(self) -> list[int]:
        """Samples of each shard, in the data set's order."""
        ...

    @property
    def entries(self) -> list[int]:
        """Shards of each entry of data.train; they sum to len(counts)."""
        ...

    @property
    def weights(self) -> list[float]:
        """Share of each entry; none: all entries are one data set."""
        ...


def of(source: Sized, seed: int, data: Data) -> SampleOrder:
    """The order of a run's samples: of one data set, or of weighted ones."""
    how = (data.shuffle_window, data.shuffle_chunk, data.replacement)
    if not source.weights:
        return Order(source.counts, seed, *how)
    ends = list(itertools.accumulate(source.entries, initial=0))
    parts = [source.counts[start:stop] for start, stop in itertools.pairwise(ends)]
    return Mixture([Order(part, mix(seed, SOURCE, n), *how) for n, part in enumerate(parts)], source.weights, seed)


def widest_chunk(counts: Sequence[int], window: int) -> int:
    """The most neighbouring samples that may share a window before batches show it.

    Two samples of a window of w are of one chunk of c with probability c / w, and then of one shard, where a uniform
    shuffle gives one shard the probability sum(n_i^2) / n^2 anyway: c is what keeps the first 4 % of the second.
    """
    total = sum(counts)
    return max(1, window * sum(count * count for count in counts) // max(1, _EXCESS * total * total))


@dataclass(frozen=True)
class _Epoch:
    """One epoch's layout of whole shards: their order, where each starts, and where the windows start."""

    shards: list[int]
    starts: list[int]
    windows: list[int]


class Order:
    """The order of one data set.

    Args:
        counts: samples of each shard, in the data set's order.
        seed: of the run.
        window: samples, rounded to whole chunks, inside which the order is fully random; 0: the shards' own order.
        chunk: neighbouring samples that share a window; 0: whole shards; None: as many as `widest_chunk` allows.
        replacement: draw with replacement inside each window (above 0); an epoch then misses some samples and repeats
            others.
    """

    def __init__(
        self,
        counts: Sequence[int],
        seed: int,
        window: int,
        chunk: int | None = 0,
        replacement: bool = False,
    ) -> None:
        self.counts, self.seed, self.window = list(counts), seed, window
        self.chunk = widest_chunk(counts, window) if chunk is None else chunk
        self._again = replacement
        self._first = list(itertools.accumulate(self.counts, initial=0))
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        return self._first[-1]

    def number(self, position: int) -> int:
        """The sample at a position >= 0; without replacement, each epoch's positions give each number once."""
        epoch, index = divmod(position, len(self))
        if not self.window:
            return index
        window, start, stop = self._window(epoch, index)
        if self._again:
            spread = start + mix(self.seed, DRAW, epoch, index) % (stop - start)
        else:
            spread = start + scatter(index - start, stop - start, mix(self.seed, WINDOW, epoch, window))
        return self._unfold(epoch, spread)

    def replacement(self, position: int, attempt: int) -> int:
        """Another sample of the window, and after some attempts, or where there is no window, any sample."""
        epoch, index = divmod(position, len(self))
        drawn = mix(self.seed, REPLACE, position, attempt)
        if attempt > _NEAR_ATTEMPTS or not self.window:
            return drawn % len(self)
        _, start, stop = self._window(epoch, index)
        return self._unfold(epoch, start + drawn % (stop - start))

    def _window(self, epoch: int, index: int) -> tuple[int, int, int]:
        """Number, first and last-but-one place of the window that holds a place of an epoch."""
        if not self.chunk:
            windows = self._epoch(epoch).windows
            window = bisect.bisect_right(windows, index) - 1
            return window, windows[window], windows[window + 1]
        size = max(1, self.window // self.chunk) * self.chunk
        last = max(1, len(self) // size) - 1  # a short tail joins the window before it
        window = min(index // size, last)
        return window, window * size, len(self) if window == last else (window + 1) * size

    def _unfold(self, epoch: int, place: int) -> int:
        """The sample at a place among an epoch's permuted chunks."""
        if self.chunk:
            chunks = len(self) // self.chunk
            turn, inside = divmod(place, self.chunk)
            if turn < chunks:  # what is left over at the end is no chunk, and stays there
                place = scatter(turn, chunks, mix(self.seed, CHUNKS, epoch)) * self.chunk + inside
            # Chunks are cut at another sample each epoch, so that the same ones are not left over or kept together.
            return (place + mix(self.seed, SHARDS, epoch)) % len(self)
        layout = self._epoch(epoch)
        turn = bisect.bisect_right(layout.starts, place) - 1
        return self._first[layout.shards[turn]] + place - layout.starts[turn]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:  # a batch may straddle two epochs
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._lay_out(epoch)
        return self._epochs[epoch]

    def _lay_out(self, epoch: int) -> _Epoch:
        shards = sorted(range(len(self.counts)), key=lambda shard: mix(self.seed, SHARDS, epoch, shard))
        starts = list(itertools.accumulate((self.counts[shard] for shard in shards), initial=0))
        last = max(1, len(self) // self.window) - 1  # a short tail joins the window before it
        owner = [min(start // self.window, last) for start in starts[:-1]]
        firsts = [start for turn, start in enumerate(starts[:-1]) if turn == 0 or owner[turn] != owner[turn - 1]]
        return _Epoch(shards, starts, [*firsts, len(self)])


class Mixture:
    """Several data sets mixed by weight, sample by sample: every stretch of positions holds the exact shares.

    Args:
        orders: of each source; each goes through epochs of its own at its own pace.
        weights: positive shares, in any unit.
        seed: of the run.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self.orders, self.seed = list(orders), seed
        self.shares = shares(weights)
        """Turns of each source in a period of sum(shares)."""
        self._source, self._before = _turns(self.shares)
        self._first = list(itertools.accumulate(map(len, self.orders), initial=0))

    def __len__(self) -> int:
        """Samples of all sources: what one epoch of the run consumes, whichever sources they come from."""
        return self._first[-1]

    def number(self, position: int) -> int:
        source, index = self._turn(position)
        return self._first[source] + self.orders[source].number(index)

    def replacement(self, position: int, attempt: int) -> int:
        """A sample of the same source, so that the shares stay exact."""
        source, index = self._turn(position)
        return self._first[source] + self.orders[source].replacement(index, attempt)

    def _turn(self, position: int) -> tuple[int, int]:
        """The source of a position, and how many samples of it came before."""
        period, at = divmod(position, len(self._source))
        source = self._source[at]
        return source, period * self.shares[source] + self._before[at]


def shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights as written in decimals, or nearly so.

    Where they would sum to more than 65,536 they are rounded to that sum by largest remainder.

    Raises:
        UserError: a share is too small for that.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [fraction * math.lcm(*(f.denominator for f in exact)) for fraction in exact]
    found = [int(fraction / math.gcd(*map(int, whole))) for fraction in whole]
    if sum(found) <= _MAX_PERIOD:
        return found
    scaled = [fraction * _MAX_PERIOD / sum(exact) for fraction in exact]
    if min(scaled) < 1:
        raise UserError(f"data.weights {min(weights)} is less than 1 in {_MAX_PERIOD:,} of all: leave that source out")
    found = [int(fraction) for fraction in scaled]
    for source in sorted(range(len(found)), key=lambda n: found[n] - scaled[n])[: max(0, _MAX_PERIOD - sum(found))]:
        found[source] += 1
    return found


def _turns(shares: Sequence[int]) -> tuple[array[int], array[int]]:
    """Whose turn each position of a period is, and how many turns that source has had.

    After any number of positions each source has had its exact share of them, rounded down or up: turn n of a source
    with a of m positions falls within [n m / a, (n + 1) m / a), and of those that may come the one that must come first
    does. Source: Balinski and Young 1975, the quota method; as a schedule, Liu and Layland 1973.
    """
    period = sum(shares)
    waiting = [(0, source, 0) for source in range(len(shares))]  # from which position on, whose, which turn
    ready: list[tuple[Fraction, int, int]] = []  # until when, whose, which turn
    turns: list[tuple[int, int]] = []
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, source, turn = heapq.heappop(waiting)
            heapq.heappush(ready, (Fraction(period * (turn + 1), shares[source]), source, turn))
        _, source, turn = heapq.heappop(ready)
        turns.append((source, turn))
        heapq.heappush(waiting, (period * (turn + 1) // shares[source], source, turn + 1))
    return array("H", [source for source, _ in turns]), array("L", [turn for _, turn in turns])
