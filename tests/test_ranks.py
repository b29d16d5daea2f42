"""The rank pools themselves: results in order, tracebacks, stuck and dead ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.ranks


def total(value: torch.Tensor) -> tuple[int, torch.Tensor]:
    mine = value + dist.get_rank()
    dist.all_reduce(mine)
    return int(os.environ["RANK"]), mine


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("this one")


def one_dies() -> None:
    if dist.get_rank() == 0:
        os._exit(7)


def one_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(30)


def test_results_come_in_rank_order(ranks):
    found = ranks(2).run(total, torch.tensor([1.0]))
    assert found == [(0, torch.tensor([3.0])), (1, torch.tensor([3.0]))]


def test_a_failing_rank_is_named_and_the_pool_lives_on(ranks):
    pool = ranks(2)
    with pytest.raises(AssertionError, match=r"(?s)^rank 1: .*KeyError: 'this one'"):
        pool.run(one_raises)
    assert ranks(2) is pool
    assert len(pool.run(total, torch.zeros(1))) == 2


@pytest.mark.parametrize(
    ("function", "told"), [(one_dies, "rank 0: the process died"), (one_sleeps, "rank 1: no answer")]
)
@pytest.mark.slow
def test_a_lost_rank_ends_the_pool_and_the_next_one_is_fresh(ranks, function, told):
    pool = ranks(2)
    with pytest.raises(AssertionError, match=told):
        pool.run(function, timeout_s=2.0)
    assert ranks(2) is not pool
    assert len(ranks(2).run(total, torch.zeros(1))) == 2
