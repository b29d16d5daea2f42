"""How good a shuffle is: how often two pairs of a batch come from one shard, beside a uniform shuffle of everything."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from dataclasses import dataclass

from pretrain.data.order import SampleOrder, Sized

_PAIRS_LOOKED_AT = 16_384
"""Positions looked at, at most: a fraction of a second."""


@dataclass(frozen=True)
class Quality:
    """Figures of a run's sample order."""

    batch: int
    same_shard: float
    """Share of the pairs of samples of a batch that are of one shard."""
    uniform: float
    """The same of batches drawn from all samples alike."""

    def __str__(self) -> str:
        ratio = f"{self.same_shard / self.uniform:.2f} times a uniform shuffle's" if self.uniform else "none expected"
        return f"{self.same_shard:.3%} of the pairs in a batch of {self.batch} are of one shard, {ratio}"


def quality(order: SampleOrder, source: Sized, batch: int, first: int = 0) -> Quality:
    """What the batches from position `first` on are like.

    A uniform shuffle draws from each weighted source alike, as often as the weights say.

    Args:
        batch: samples of a batch; at most 16,384 positions are looked at, in batches spread over an epoch.
    """
    starts = list(itertools.accumulate(source.counts, initial=0))
    size = max(2, min(batch, len(order), _PAIRS_LOOKED_AT))
    batches = max(1, min(_PAIRS_LOOKED_AT // size, len(order) // size))
    same, drawn = 0, Counter[int]()
    for turn in range(batches):
        at = first + turn * (len(order) // batches)
        shards = Counter(bisect.bisect_right(starts, order.number(at + row)) - 1 for row in range(size))
        same += sum(count * (count - 1) for count in shards.values())
        drawn.update(shards)
    return Quality(batch, same / (batches * size * (size - 1)), _uniform(source, drawn))


def _uniform(source: Sized, drawn: Counter[int]) -> float:
    """Chance that two samples are of one shard, each entry giving the share of samples that it was seen to give."""
    entries = source.entries if source.weights else [len(source.counts)]
    ends = list(itertools.accumulate(entries, initial=0))
    total, chance = drawn.total(), 0.0
    for start, stop in itertools.pairwise(ends):
        counts, share = source.counts[start:stop], sum(drawn[shard] for shard in range(start, stop)) / total
        size = sum(counts)
        if size > 1:
            chance += share * share * sum(count * (count - 1) for count in counts) / (size * (size - 1))
    return chance
