"""Which sample comes when: pure functions of (seed, position), with no state to save and nothing to replay.

A run reads one endless stream. Position p lies in epoch p // n. Each epoch permutes the shards, cuts them into windows
of whole shards, and permutes the samples inside a window; so every epoch holds every sample once, reads stay within a
few shards at a time, and any position is found without walking to it. Only integer arithmetic that is written out here
is used, never a library's generator, so that a run goes on in the same order under other versions of Python and NumPy.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

SHARDS, WINDOW, AUGMENT, REPLACE, CHUNKS, DRAW, VIEW, SOURCE = range(1, 9)
"""What a draw is for: draws for different purposes never share a key."""
_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 8


def mix(*words: int) -> int:
    """64 bits that look random and depend on every one of the integers. Source: Steele et al. 2014 (SplitMix64)."""
    state = 0
    for word in words:
        state = _finish(((state ^ (word & _MASK)) + 0x9E3779B97F4A7C15) & _MASK)
    return state


def sample_random(seed: int, position: int, attempt: int = 0) -> random.Random:
    """The randomness of one position (caption, crop, flip). Use `.random()` only: Python promises its sequence."""
    return random.Random(mix(seed, AUGMENT, position, attempt))


def view_random(seed: int, position: int, attempt: int, view: int) -> random.Random:
    """The randomness of a further view of the image or caption at a position, apart from the first view's."""
    return random.Random(mix(seed, VIEW, position, attempt, view))


def scatter(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) sends `index`, without the others being computed.

    A Feistel network permutes the next power of two; what falls outside is permuted again until it falls inside
    (on average less than twice). Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    value = _feistel(index, low, bits - low, key)
    while value >= size:
        value = _feistel(value, low, bits - low, key)
    return value


def _feistel(value: int, low: int, high: int, key: int) -> int:
    low_mask, high_mask = (1 << low) - 1, (1 << high) - 1
    left, right = value >> low, value & low_mask
    for turn in range(0, _FEISTEL_ROUNDS, 2):
        left ^= _finish(key ^ (turn << 56) ^ right) & high_mask
        right ^= _finish(key ^ ((turn + 1) << 56) ^ left) & low_mask
    return left << low | right


def _finish(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class _Epoch:
    """One epoch's layout: shards in their order, where each starts, and where the windows start."""

    shards: list[int]
    starts: list[int]
    windows: list[int]


class Order:
    """Position in the endless stream -> sample number in the data set.

    Args:
        counts: samples of each shard, in the data set's order.
        seed: of the run.
        shuffle: False gives the shards' own order, every epoch.
        window: samples, rounded to whole shards, inside which the order is fully random.
    """

    def __init__(self, counts: Sequence[int], seed: int, shuffle: bool, window: int) -> None:
        self.counts, self.seed, self.shuffle, self.window = list(counts), seed, shuffle, window
        self._first = list(itertools.accumulate(self.counts, initial=0))
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self._first[-1]

    def number(self, position: int) -> int:
        """The sample at a position >= 0; each epoch's positions give each number once."""
        epoch, index = divmod(position, len(self))
        if not self.shuffle:
            return index
        layout = self._epoch(epoch)
        window = bisect.bisect_right(layout.windows, index) - 1
        start, stop = layout.windows[window], layout.windows[window + 1]
        spread = start + scatter(index - start, stop - start, mix(self.seed, WINDOW, epoch, window))
        turn = bisect.bisect_right(layout.starts, spread) - 1
        return self._first[layout.shards[turn]] + spread - layout.starts[turn]

    def replacement(self, position: int, attempt: int) -> int:
        """Which sample stands in for an unusable one, on the first, second, ... attempt."""
        return mix(self.seed, REPLACE, position, attempt) % len(self)

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
