"""What every exchange promises, on real ranks: order, gradients summed to the owner, refusals on all of them."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pretrain import exchange
from pretrain.errors import UserError
from pretrain.exchange import Options
from pretrain.exchange.hierarchical import Hierarchical, launched
from pretrain.exchange.local import Local
from pretrain.exchange.transport import Alone, Collectives

MANY = [name for name in exchange.names() if name != "local"]
SERVED = [(name, size) for name in exchange.names() for size in ((1,) if name == "local" else (1, 2, 3, 4))]


def way_of(name, group=None, **options):
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    return exchange.make(name, rank, size, Options(**options), group)


def walk(name, rows, **options):
    """Columns of all ranks, and the gradient each rank receives when rank r weighs column c with (r + 1) * (c + 1)."""
    way = way_of(name, checks=math.inf, **options)
    start, count = sum(rows[: way.rank]), rows[way.rank]
    own = torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, 3)
    trip, seen = way.bring(own), {}

    def share(block):
        numbers = torch.arange(trip.count)[block.numbers]
        return (way.rank + 1.0) * (numbers[:, None] + 1).expand(-1, 3).float()

    for block in trip.blocks():
        numbers = torch.arange(trip.count)[block.numbers].tolist()
        seen |= dict(zip(numbers, block.columns[:, 0].tolist(), strict=True))
    taken = [trip.collect(share).take(torch.tensor(2.0), keep=True) for _ in range(2)]
    assert torch.equal(*taken)
    return trip.count, seen, taken[0], own, way.sent


def assert_walked(found, rows):
    weight = len(rows) * (len(rows) + 1)
    for count, seen, gradient, own, sent in found:
        assert count == sum(rows)
        assert seen == {number: number for number in range(count)}
        assert torch.equal(gradient, weight * (own + 1))
        assert (sent > 0) == (len(rows) > 1)


@pytest.mark.ranks
@pytest.mark.parametrize("rows", [[2, 2, 2, 2], [3, 0, 5, 1]], ids=["even", "uneven"])
@pytest.mark.parametrize(("name", "size"), SERVED)
def test_every_column_comes_once_and_owners_get_the_summed_gradient(ranks, name, size, rows):
    assert_walked(ranks(size).run(walk, name, rows[:size]), rows[:size])


def on_two_nodes(rows):
    return walk("hierarchical", rows, node_size=2)


@pytest.mark.ranks
@pytest.mark.parametrize("rows", [[2, 2, 2, 2], [3, 0, 5, 1]], ids=["even", "uneven"])
def test_two_nodes_of_two(ranks, rows):
    assert_walked(ranks(4).run(on_two_nodes, rows), rows)


def rounded(name):
    """A gradient that travels in bf16: whole numbers that bf16 holds come back as they are, in fp32."""
    way = way_of(name, checks=0, accumulators=torch.bfloat16)
    trip = way.bring(torch.ones(3, 2, dtype=torch.bfloat16))
    return trip.collect(lambda block: torch.ones(block.columns.shape)).take(torch.tensor(1.0))


@pytest.mark.ranks
@pytest.mark.parametrize("name", MANY)
def test_gradients_may_travel_in_bf16(ranks, name):
    for gradient in ranks(3).run(rounded, name):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, torch.full((3, 2), 3.0))


def small(name):
    way = way_of(name)
    partial = (torch.tensor([1.0, 10.0]) * (way.rank + 1)).requires_grad_()
    total = way.sum(partial)
    (total * (way.rank + 1)).sum().backward()
    rows = torch.full((1, 2), 7.0 * way.rank).requires_grad_()
    gathered = way.gather(rows)
    (gathered * (way.rank + 1)).sum().backward()
    largest = way.max(torch.tensor([way.rank, -way.rank], dtype=torch.float32).requires_grad_())
    return total.detach(), partial.grad, largest, gathered.detach(), rows.grad


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "size"), SERVED)
def test_sum_max_and_gather(ranks, name, size):
    weight = size * (size + 1) / 2
    for total, grad, largest, gathered, rows_grad in ranks(size).run(small, name):
        assert total.tolist() == [weight, 10 * weight]
        assert grad.tolist() == [weight, weight]
        assert largest.tolist() == [size - 1, 0]
        assert not largest.requires_grad
        assert gathered.tolist() == [[7 * rank] * 2 for rank in range(size)]
        assert rows_grad.tolist() == [[weight, weight]]


def refusal(name, rows, width, dtype, problems):
    way = way_of(name, checks=1)
    columns = torch.zeros(rows[way.rank], width[way.rank], dtype=dtype[way.rank])
    assert way.checking
    try:
        way.bring(columns, problems[way.rank])
    except ValueError as error:
        return str(error)
    return "no error"


FP32 = [torch.float32] * 3


@pytest.mark.ranks
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "problems", "told"),
    [
        ([4, 4, 3], [2, 2, 2], FP32, [None] * 3, "no error"),
        ([4, 0, 4], [2, 2, 2], FP32, [None] * 3, "no error"),
        ([0, 0, 0], [2, 2, 2], FP32, [None] * 3, "with at least one row"),
        ([4, 4, 4], [2, 3, 2], FP32, [None] * 3, r"widths: \[2, 3, 2\]"),
        ([4, 4, 4], [2, 2, 2], [*FP32[:2], torch.float64], [None] * 3, "dtypes: float32, float32, float64"),
        ([4, 4], [2, 2], [torch.float16, torch.bfloat16], [None] * 2, "dtypes: float16, bfloat16"),
        ([4, 4, 4], [2, 2, 2], FP32, [None, None, "broken: " + "x" * 1000], "rank 2: broken: xxx"),
    ],
)
def test_batches_that_do_not_fit_are_refused_on_every_rank(ranks, name, rows, width, dtype, problems, told):
    found = ranks(len(rows)).run(refusal, name, rows, width, dtype, problems)
    assert len(set(found)) == 1
    with pytest.raises(ValueError, match=told):
        raise ValueError(found[0])


def later_problem():
    """After the checked batches a problem is this rank's alone: nothing is sent."""
    way = way_of("ring", checks=1)
    for _ in way.bring(torch.ones(2, 2)).blocks():
        pass
    before = way.sent
    assert not way.checking
    with pytest.raises(ValueError, match="width"):
        way.bring(torch.ones(2, 2), "width")
    return way.sent - before


@pytest.mark.ranks
def test_later_problems_cost_no_message(ranks):
    assert ranks(2).run(later_problem) == [0, 0]


def wrong_size():
    errors = []
    for rank, size in ((dist.get_rank(), 3), (1 - dist.get_rank(), 2)):
        try:
            exchange.make("gather", rank, size)
        except ValueError as error:
            errors.append(str(error))
    return errors


@pytest.mark.ranks
def test_a_group_of_another_size_is_refused_before_anything_is_sent(ranks):
    for rank, (size, order) in enumerate(ranks(2).run(wrong_size)):
        assert size == f"rank {rank} of 3 cannot exchange in a process group where it is rank {rank} of 2"
        assert order == f"rank {1 - rank} of 2 cannot exchange in a process group where it is rank {rank} of 2"


def in_groups(name):
    """Two groups of two, each exchanging among themselves, connected by their own members alone."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    way = way_of(name, group, node_size=2 if dist.get_rank() < 2 else 1, checks=math.inf)
    blocks = list(way.bring(torch.tensor([[float(dist.get_rank())]])).blocks())
    seen = sorted(number for block in blocks for number in block.columns.flatten().tolist())
    return seen, way.sum(torch.tensor(dist.get_rank())).item(), way.gather(torch.tensor([dist.get_rank()])).tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("name", MANY)
def test_a_group_of_the_ranks(ranks, name):
    first, second = ([0, 1], 1, [0, 1]), ([2, 3], 5, [2, 3])
    assert ranks(4).run(in_groups, name) == [first, first, second, second]


def nodes_in_groups():
    """What the two ways of a split connect: each rank's own number, gathered inside its node and across."""
    group = dist.new_group([0, 1, 2, 3])
    inside, across = Collectives(dist.get_rank(), 4, group).split(2)
    gathered = [torch.empty(2), torch.empty(2)]
    for way, into in zip((inside, across), gathered, strict=True):
        way.all_gather(into, torch.tensor([float(dist.get_rank())])).wait()
    return [into.tolist() for into in gathered], (inside.rank, across.rank)


@pytest.mark.ranks
def test_nodes_and_places_are_consecutive(ranks):
    found = ranks(4).run(nodes_in_groups)
    assert [ways for ways, _ in found] == [
        [[0, 1], [0, 2]],
        [[0, 1], [1, 3]],
        [[2, 3], [0, 2]],
        [[2, 3], [1, 3]],
    ]
    assert [places for _, places in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_NTASKS_PER_NODE": "1"}, 4),
    ],
)
def test_a_node_is_what_the_launcher_says(monkeypatch, variables, size):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == size


@pytest.mark.parametrize("size", [0, 2, -1])
def test_nodes_must_make_up_the_world(size):
    with pytest.raises(ValueError, match=f"node_size {size} must divide the number of ranks, 1"):
        Hierarchical(Alone(), Options(node_size=size))


def test_auto_follows_the_world():
    assert isinstance(exchange.make("auto", 0, 1), Local)


def kinds():
    return type(way_of("auto")).__name__


@pytest.mark.ranks
def test_auto_takes_gather_for_more_ranks(ranks):
    assert set(ranks(2).run(kinds)) == {"Gather"}


def test_local_is_refused_on_more_ranks():
    with pytest.raises(
        UserError, match="exchange local keeps each of 4 ranks to its own negatives; set exchange: auto"
    ):
        exchange.make("local", 0, 4)
    with pytest.raises(ValueError, match="serves one rank, not rank 1 of 2"):
        Local(SimpleNamespace(rank=1, size=2))


def test_one_rank_has_nobody_to_send_to():
    with pytest.raises(ValueError, match="nobody to send 1 messages to"):
        Alone().swap([(torch.ones(1), 0)], [])


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="exchange 'gathr' does not exist; did you mean gather"):
        exchange.make("gathr", 0, 2)
