"""The sample order: a permutation of every epoch, a pure function, at any size."""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import Data
from pretrain.data import order as orders
from pretrain.data.draws import SOURCE
from pretrain.data.order import Mixture, Order, mix, sample_random, scatter, shares, view_random, widest_chunk
from pretrain.data.shuffle import quality
from pretrain.errors import UserError


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_scatter_is_a_permutation(size: int, key: int) -> None:
    assert sorted(scatter(index, size, key) for index in range(size)) == list(range(size))


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    seed=st.integers(-5, 2**63),
    window=st.integers(1, 200),
    chunk=st.integers(0, 50) | st.none(),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_every_epoch_holds_every_sample_once(
    counts: list[int], seed: int, window: int, chunk: int | None, epoch: int
) -> None:
    order = Order(counts, seed, window, chunk)
    size = len(order)
    assert size == sum(counts)
    assert sorted(order.number(epoch * size + index) for index in range(size)) == list(range(size))


def test_order_is_pure() -> None:
    order, fresh = Order([50, 70, 31], 3, 60), Order([50, 70, 31], 3, 60)
    forwards = [order.number(p) for p in range(600)]
    backwards = [pickle.loads(pickle.dumps(fresh)).number(p) for p in reversed(range(600))]
    assert forwards == backwards[::-1]


def test_order_never_changes_between_versions() -> None:
    """A run must go on in the same order after an upgrade: these numbers are part of the promise."""
    order = Order([10, 10, 10, 10], 0, 20)
    assert [order.number(p) for p in range(12)] == [17, 19, 12, 39, 13, 35, 33, 30, 31, 11, 15, 14]
    assert mix(1, 2, 3) == 15020427595393229491
    assert [int(sample_random(0, 5).random() * 1000) for _ in range(2)] == [483] * 2


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = Order([100] * 10, seed, 300)
        return [order.number(number * 1000 + i) for i in range(1000)]

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    for one in range(3):
        for other in range(one):
            assert sum(a == b for a, b in zip(orders[one], orders[other], strict=True)) < 30  # chance: about 1


def test_without_shuffle_the_shards_come_in_order() -> None:
    order = Order([3, 4], 9, 0)
    assert [order.number(p) for p in range(14)] == list(range(7)) * 2
    assert {order.replacement(5, attempt) for attempt in range(1, 65)} == set(range(7)), "any sample may stand in"


def test_window_mixes_shards_and_bounds_them() -> None:
    order = Order([100] * 100, 0, 1000)
    first = [order.number(p) for p in range(1000)]
    shards = Counter(number // 100 for number in first)
    assert len(shards) == 10, "a window of 1000 samples is ten whole shards"
    assert sorted(shards) != list(range(10)), "the shards themselves are permuted over the whole data set"
    early = Counter(number // 100 for number in first[:100])
    assert len(early) == 10, "each of the ten is met within the first tenth of the window"
    assert max(early.values()) < 30
    drift = sum(number % 100 for number in first[:200]) / 200
    assert 40 < drift < 59, "place inside a shard does not follow place in the window"


def test_a_window_smaller_than_a_shard_is_one_shard() -> None:
    order = Order([100] * 5, 0, 10)
    shards = [order.number(p) // 100 for p in range(500)]
    assert all(len(set(shards[at : at + 100])) == 1 for at in range(0, 500, 100))


def test_uniform_over_places() -> None:
    """Chi-square of where sample 0 falls, over 4000 epochs and 16 places: 15 degrees, 99.9 % below 37.7."""
    order = Order([16], 7, 16)
    counts = Counter(next(i for i in range(16) if order.number(e * 16 + i) == 0) for e in range(4000))
    assert sum((counts[i] - 250) ** 2 / 250 for i in range(16)) < 37.7


def test_a_billion_samples() -> None:
    order = Order([10_000] * 100_000, 0, 50_000)
    assert len(order) == 10**9
    window = {order.number(3 * 10**9 + p) for p in range(50_000)}
    assert len(window) == 50_000
    assert len({number // 10_000 for number in window}) == 5
    assert 0 <= order.number(7 * 10**9 + 123_456_789) < 10**9


def test_replacements_depend_on_the_attempt() -> None:
    order = Order([1000], 0, 1000)
    drawn = [order.replacement(5, attempt) for attempt in range(1, 17)]
    assert len(set(drawn)) > 12
    assert drawn == [Order([1000], 0, 1000).replacement(5, attempt) for attempt in range(1, 17)]


def test_a_short_tail_joins_the_window_before_it() -> None:
    order = Order([10] * 5, 0, 20)
    shards = [order.number(p) // 10 for p in range(50)]
    assert len(set(shards[:20])) == 2
    assert len(set(shards[20:])) == 3
    assert len(set(shards[20:40])) == 3, "the last shard is not left to itself"


CHUNKED = [29, 31, 9, 26, 10, 22, 5, 2, 3, 8, 27, 11]
DRAWN = [31, 29, 6, 3, 6, 29, 28, 11, 5, 11, 9, 22]
MIXED = [9, 3, 8, 14, 5, 4, 1, 15, 6, 0, 2, 13]


@dataclass
class Samples:
    """The sizes of a data set, which is all that an order needs."""

    counts: list[int]
    entries: list[int]
    weights: list[float] = field(default_factory=list)


def test_chunked_order_never_changes_between_versions() -> None:
    order = Order([10, 10, 10, 10], 0, 20, 5)
    assert [order.number(p) for p in range(12)] == CHUNKED
    again = Order([10, 10, 10, 10], 0, 20, 5, replacement=True)
    assert [again.number(p) for p in range(12)] == DRAWN
    both = Mixture([Order([10], mix(0, SOURCE, 0), 20), Order([6], mix(0, SOURCE, 1), 20)], [3, 1], 0)
    assert [both.number(p) for p in range(12)] == MIXED


def test_chunks_share_a_window() -> None:
    order = Order([1000] * 10, 3, 1000, 20)
    first = sorted(order.number(p) for p in range(1000))
    runs = Counter(number - turn for turn, number in enumerate(first))
    assert len(runs) > 25, "chunks come from all over the data set"
    assert min(count % 20 for count in runs.values()) == 0
    assert {number // 1000 for number in first} == set(range(10))


@pytest.mark.parametrize("shards", [2, 10, 50, 300, 1243, 5000])
def test_default_window_is_as_good_as_a_uniform_shuffle(shards: int) -> None:
    """Same-shard pairs of a batch, at the default window, within 5 % of a uniform shuffle of the whole data set."""
    data = Samples([10_000] * shards, [shards])
    order = orders.of(data, 1, Data(train=("synthetic:1024",)))
    assert isinstance(order, Order)
    chance = ((order.chunk or 1) - 1) / 50_000 + 1 / shards  # of one chunk, or of one shard anyway
    assert chance < 1.05 / shards or len(order) <= 50_000
    found = quality(order, data, 4096)
    expected = 2 / (found.uniform * 4 * 4096 * 4095)  # relative variance of a count of that many pairs
    assert abs(found.same_shard / found.uniform - 1) < 0.05 + 4 * expected**0.5


def test_quality_tells_a_bad_shuffle() -> None:
    data = Samples([10_000] * 100, [100])
    whole, none = (Order(data.counts, 1, window, 0) for window in (50_000, 0))
    assert 15 < quality(whole, data, 4096).same_shard / 0.01 < 25, "five shards at a time"
    assert quality(none, data, 4096).same_shard > 0.9
    assert "20." in str(quality(whole, data, 4096)) or "19." in str(quality(whole, data, 4096))


def test_unequal_shards_allow_wider_chunks() -> None:
    assert widest_chunk([10_000] * 100, 50_000) == 20
    assert widest_chunk([10_000] * 100_000, 50_000) == 1
    assert widest_chunk([1_000_000, 10], 50_000) == 1999
    assert widest_chunk([], 5) == 1


@given(weights=st.lists(st.integers(1, 999).map(lambda n: n / 100), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_every_stretch_holds_the_exact_shares(weights: list[float]) -> None:
    mixture = Mixture([Order([50], n, 10) for n in range(len(weights))], weights, 0)
    period, had = sum(mixture.shares), [0] * len(weights)
    positions = range(min(period, 3000))
    for position in positions:
        had[mixture.number(position) // 50] += 1
        for source, count in enumerate(had):
            assert abs(count - (position + 1) * mixture.shares[source] / period) < 1, (
                "from the start, so in any stretch"
            )
    for source, share in enumerate(mixture.shares):
        assert share / period == pytest.approx(weights[source] / sum(weights), abs=1e-4)


def test_shares_are_as_written() -> None:
    assert shares([0.7, 0.3]) == [7, 3]
    assert shares([1.0, 1.0, 2.0]) == [1, 1, 2]
    assert shares([0.5]) == [1]
    found = shares([0.123456789, 0.87, 0.00002])
    assert sum(found) == 1 << 16
    assert found[2] == 1, "no source is lost by rounding"
    with pytest.raises(UserError, match=r"data\.weights 1e-07 is less than 1 in 65,536"):
        shares([0.123456789, 0.87, 1e-7])


def test_many_small_sources_do_not_clump() -> None:
    mixture = Mixture([Order([50], n, 10) for n in range(101)], [0.5] + [0.005] * 100, 0)
    large = [mixture.number(position) < 50 for position in range(400)]
    for length in (2, 10, 100):
        counts = {sum(large[at : at + length]) for at in range(400 - length)}
        assert counts <= {length // 2 - 1, length // 2, length // 2 + 1}


def test_sources_go_through_epochs_of_their_own() -> None:
    data = Samples([30, 10, 25], [2, 1], [2.0, 1.0])
    order = orders.of(data, 4, Data(train=("synthetic:1024",), shuffle_window=8))
    assert len(order) == 65
    numbers = [order.number(p) for p in range(120)]
    first, second = [n for n in numbers if n < 40], [n for n in numbers if n >= 40]
    assert (len(first), len(second)) == (80, 40)
    assert sorted(first[:40]) == sorted(first[40:]) == list(range(40))
    assert first[:40] != first[40:]
    assert sorted(second[:25]) == list(range(40, 65))
    for position, number in enumerate(numbers):
        stands_in = {order.replacement(position, attempt) >= 40 for attempt in range(1, 17)}
        assert stands_in == {number >= 40}, "of the same source"


def test_with_replacement_stays_in_the_window() -> None:
    order = Order([100] * 20, 0, 500, 0, replacement=True)
    for start in range(0, 2000, 500):
        window = [order.number(p) for p in range(start, start + 500)]
        assert len({number // 100 for number in window}) == 5
        assert 290 < len(set(window)) < 340, "about 1 - 1/e of the window's samples"


def test_replacements_come_from_the_window_first() -> None:
    order = Order([100] * 50, 0, 500, 0)
    window = {order.number(p) // 100 for p in range(500)}
    near = {order.replacement(p, attempt) // 100 for p in range(100) for attempt in range(1, 9)}
    far = {order.replacement(p, attempt) // 100 for p in range(100) for attempt in range(9, 17)}
    assert near <= window
    assert len(far) > 40, "a window of nothing but bad samples does not stop a run"


def test_a_billion_samples_of_three_sources() -> None:
    data = Samples([10_000] * 100_000, [60_000, 30_000, 10_000], [0.5, 0.3, 0.2])
    order = orders.of(data, 0, Data(train=("synthetic:1024",)))
    far = [order.number(5 * 10**9 + p) for p in range(1000)]
    assert Counter(bool(n >= 6 * 10**8) + bool(n >= 9 * 10**8) for n in far) == {0: 500, 1: 300, 2: 200}
    assert len(set(far)) == 1000


def test_views_have_randomness_of_their_own() -> None:
    draws = [view_random(1, 2, 0, view).random() for view in range(3)] + [sample_random(1, 2).random()]
    assert len(set(draws)) == 4
    assert view_random(1, 2, 0, 1).random() == draws[1]


def test_period_of_many_sources_is_bounded() -> None:
    weights = [random.Random(n).random() for n in range(40)]
    found = shares(weights)
    assert sum(found) == 1 << 16
    assert all(abs(a / sum(found) - w / sum(weights)) < 1e-4 for a, w in zip(found, weights, strict=True))
    assert list(itertools.accumulate(found))[-1] == sum(found)
