"""Threads that read ahead: order, bounds, errors where they belong, and no lock that waits for itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from pretrain.data.images.decode import BadSample
from pretrain.data.read_ahead import ReadAhead
from pretrain.data.shards.reader import RawSample
from pretrain.errors import UserError


class Reads:
    """A source that remembers who asked for what, and does as told."""

    def __init__(self, do: Callable[[int], None] = lambda number: None, size: int = 10) -> None:
        self.do, self.size = do, size
        self.by: dict[int, list[str]] = {}

    def __call__(self, number: int) -> RawSample:
        self.by.setdefault(number, []).append(threading.current_thread().name)
        self.do(number)
        return RawSample(str(number), bytes(self.size), {}, {})


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.001)


def plan(numbers: range) -> list[tuple[int, int]]:
    return [(place, place) for place in numbers]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_every_sample_is_read_once(threads: int) -> None:
    reads = Reads(lambda number: time.sleep(0.0005 * (number % 3)))
    ahead = ReadAhead(reads, threads)
    ahead.want(plan(range(50)))
    ahead.want(plan(range(50, 100)))
    assert [ahead.take(place, place).key for place in range(100)] == [str(place) for place in range(100)]
    assert all(len(by) == 1 for by in reads.by.values())
    assert len(reads.by) == 100
    ahead.close()


def test_threads_read_before_anybody_asks() -> None:
    reads = Reads()
    ahead = ReadAhead(reads, 2)
    ahead.want(plan(range(6)))
    wait_until(lambda: len(reads.by) == 6)
    ahead.take(5, 5)
    ahead.take(0, 0)
    assert {name for by in reads.by.values() for name in by} == {"read-ahead"}
    ahead.close()


def test_a_sample_may_stand_at_two_places() -> None:
    reads = Reads()
    ahead = ReadAhead(reads, 1)
    ahead.want([(0, 7), (1, 7)])
    assert ahead.take(1, 7).key == ahead.take(0, 7).key == "7"
    ahead.close()


def test_what_was_not_planned_is_read_by_the_taker() -> None:
    reads = Reads()
    ahead = ReadAhead(reads, 1)
    assert ahead.take(3, 9).key == "9"
    assert reads.by == {9: [threading.current_thread().name]}
    ahead.close()


@pytest.mark.parametrize("error", [BadSample("empty"), UserError("a.tar: gone"), OSError("reset"), KeyError("bug")])
@pytest.mark.parametrize("threads", [0, 2])
def test_what_reading_raises_comes_where_the_sample_is_taken(error: Exception, threads: int) -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise error

    ahead = ReadAhead(Reads(fail), threads)
    ahead.want(plan(range(5)))
    assert [ahead.take(place, place).key for place in (0, 1)] == ["0", "1"]
    with pytest.raises(type(error)) as caught:
        ahead.take(2, 2)
    assert caught.value is error
    assert [ahead.take(place, place).key for place in (3, 4)] == ["3", "4"]
    ahead.close()


def test_memory_is_bounded_by_bytes_and_reading_goes_on_as_they_are_taken() -> None:
    reads = Reads(size=100)
    ahead = ReadAhead(reads, threads=2, max_bytes=500)
    ahead.want(plan(range(40)))
    wait_until(lambda: len(reads.by) >= 5)
    time.sleep(0.05)
    assert len(reads.by) <= 5 + 1, "the bound, and what the other thread had begun"
    for taken, place in enumerate(range(40), 1):
        ahead.take(place, place)
        assert len(reads.by) <= taken + 6
    assert len(reads.by) == 40
    ahead.close()


def test_one_sample_above_the_bound_holds_nothing_up() -> None:
    ahead = ReadAhead(Reads(size=1000), threads=1, max_bytes=1)
    ahead.want(plan(range(5)))
    assert [ahead.take(place, place).key for place in range(5)] == list("01234")
    ahead.close()


def test_a_taker_does_not_wait_for_threads_that_are_busy_elsewhere() -> None:
    gate = threading.Event()
    reads = Reads(lambda number: gate.wait(30) if number == 0 else None)  # type: ignore[func-returns-value]
    ahead = ReadAhead(reads, threads=1)
    ahead.want(plan(range(3)))
    wait_until(lambda: 0 in reads.by)
    assert ahead.take(1, 1).key == "1"
    assert not gate.is_set()
    gate.set()
    assert ahead.take(0, 0).key == "0"
    ahead.close()


def test_threads_end_when_it_is_closed() -> None:
    before = set(threading.enumerate())
    ahead = ReadAhead(Reads(), threads=3)
    own = set(threading.enumerate()) - before
    assert len(own) == 3
    ahead.close()
    wait_until(lambda: not any(thread.is_alive() for thread in own))
