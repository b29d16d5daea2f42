"""What every exchange promises, on real ranks: order, gradients summed to the owner, refusals on all of them."""

import pytest
import torch
import torch.distributed as dist

from pretrain import exchange
from pretrain.errors import UserError
from pretrain.exchange.gather import Gather
from pretrain.exchange.local import Local

SERVED = [(name, size) for name in exchange.names() for size in ((1,) if name == "local" else (1, 2, 3, 4))]


def walk(name):
    """Columns of all ranks, and the gradient each rank receives when rank r weighs column c with (r + 1) * (c + 1)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    way = exchange.find(name, size)(rank, size)
    own = (torch.arange(2.0) + 2 * rank)[:, None].expand(2, 3).clone().requires_grad_()
    blocks = list(way.blocks(own))
    total = 0.0
    for block in blocks:
        number = torch.arange(block.start, block.start + len(block.columns)) + 1
        total = total + ((rank + 1) * number[:, None] * block.columns).sum()
    total.backward()
    return [(b.start, b.columns.detach()) for b in blocks], own.grad


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "size"), SERVED)
def test_blocks_hold_every_column_once_and_owners_get_the_summed_gradient(ranks, name, size):
    for rank, (blocks, grad) in enumerate(ranks(size).run(walk, name)):
        columns = torch.cat([columns for _, columns in sorted(blocks, key=lambda block: block[0])])
        assert columns[:, 0].tolist() == list(range(2 * size))
        assert min(start for start, _ in blocks) == 0
        number = torch.arange(2.0) + 2 * rank + 1
        weight = size * (size + 1) / 2
        assert torch.equal(grad, (weight * number)[:, None].expand(2, 3))


def sums(name):
    rank, size = dist.get_rank(), dist.get_world_size()
    way = exchange.find(name, size)(rank, size)
    partial = torch.tensor([1.0, 10.0]) * (rank + 1)
    partial.requires_grad_()
    total = way.sum(partial)
    (total * (rank + 1)).sum().backward()
    largest = way.max(torch.tensor([rank, -rank], dtype=torch.float32).requires_grad_())
    ids = way.gather(torch.tensor([7 * rank]))
    return total.detach(), partial.grad, largest, ids


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "size"), SERVED)
def test_sum_max_and_gather(ranks, name, size):
    weight = size * (size + 1) / 2
    for total, grad, largest, ids in ranks(size).run(sums, name):
        assert total.tolist() == [weight, 10 * weight]
        assert grad.tolist() == [weight, weight]
        assert largest.tolist() == [size - 1, 0]
        assert not largest.requires_grad
        assert ids.tolist() == [7 * rank for rank in range(size)]


def uneven(rows, width, dtype):
    rank, size = dist.get_rank(), dist.get_world_size()
    columns = torch.zeros(rows[rank], width[rank], dtype=dtype[rank])
    try:
        list(Gather(rank, size, checked=True).blocks(columns))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        ([4, 4, 3], [2, 2, 2], [torch.float32] * 3),
        ([4, 0, 4], [2, 2, 2], [torch.float32] * 3),
        ([4, 4, 4], [2, 3, 2], [torch.float32] * 3),
        ([4, 4, 4], [2, 2, 2], [torch.float32, torch.float32, torch.float64]),
    ],
)
def test_uneven_ranks_are_refused_on_every_rank(ranks, rows, width, dtype):
    told = ranks(3).run(uneven, rows, width, dtype)
    assert len(set(told)) == 1
    assert f"rows by rank: {rows}" in told[0]
    assert "Drop or even out the last batch" in told[0]


def collectives(checked):
    rank, size = dist.get_rank(), dist.get_world_size()
    seen = []
    way = Gather(rank, size, checked=checked)
    way._check = lambda columns: seen.append(len(columns))
    way.gather(torch.zeros(2, 2))
    way.checked = not checked
    way.gather(torch.zeros(2, 2))
    return len(seen)


@pytest.mark.ranks
@pytest.mark.parametrize("checked", [True, False])
def test_the_check_can_be_turned_on_and_off(ranks, checked):
    assert ranks(2).run(collectives, checked) == [1, 1]


def in_groups():
    """Two groups of two, each exchanging among themselves."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    way = Gather(rank % 2, 2, groups[rank // 2])
    return way.gather(torch.tensor([[float(rank)]])).flatten().tolist(), way.sum(torch.tensor(rank)).item()


@pytest.mark.ranks
def test_a_group_of_the_ranks(ranks):
    assert ranks(4).run(in_groups) == [([0, 1], 1), ([0, 1], 1), ([2, 3], 5), ([2, 3], 5)]


def test_auto_follows_the_world():
    assert isinstance(exchange.find("auto", 1)(0, 1), Local)
    assert isinstance(exchange.find("auto", 2)(0, 2), Gather)


def test_local_is_refused_on_more_ranks():
    with pytest.raises(
        UserError, match="exchange local keeps each of 4 ranks to its own negatives; set exchange: auto"
    ):
        exchange.find("local", 4)
    with pytest.raises(ValueError, match="serves one rank"):
        Local(1, 2)


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="exchange 'gathr' does not exist; did you mean gather"):
        exchange.find("gathr", 2)
