"""Ranks of a second attempt meet each other, not what the first attempt left in the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from pretrain import rendezvous
from pretrain.errors import RanksLost


def attempt(store: dist.Store, size: int) -> set[str]:
    """The names that the ranks of one attempt end up with; ranks come in the worst order, rank 0 first."""

    def rank(number: int) -> str:
        own = store.clone() if number else store
        if number == 0:
            return rendezvous._name_attempt(own, size, 20.0)
        threading.Event().wait(0.1 * number)
        return rendezvous._learn_name(own, number, 20.0)

    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(rank, range(size)))


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_attempt_has_a_name_of_its_own(size: int, store: dist.Store) -> None:
    names = [attempt(store, size) for _ in range(3)]
    assert all(len(found) == 1 for found in names), "ranks of one attempt agree"
    assert len(set.union(*names)) == 3, "attempts differ"


def test_a_call_of_a_dead_rank_is_not_taken_for_a_rank(store: dist.Store) -> None:
    store.set("call/1", "left by the attempt before")
    with pytest.raises(RanksLost, match=r"ranks \[1\] did not come"):
        rendezvous._name_attempt(store, 2, 0.3)
