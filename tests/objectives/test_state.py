"""The queue: first in first out over any batch size, exact on restore, the same on every rank."""

import pytest
import torch
import torch.distributed as dist

from pretrain import exchange
from pretrain.objectives.state import EMPTY, Queue


def fed(queue, *sizes):
    """Enqueue batches of counted features: row k is full of k and has id k."""
    start = 0
    for size in sizes:
        ids = torch.arange(start, start + size)
        queue.enqueue(ids[:, None].float().expand(-1, 3), ids)
        start += size
    return queue


@pytest.mark.parametrize("sizes", [(2,), (5,), (2, 2), (3, 3, 3), (5, 1), (12,), (4, 13), (4, 13, 2), (0, 2)])
def test_it_holds_the_last_ones(sizes):
    queue = fed(Queue(5, 3), *sizes)
    last = set(range(sum(sizes)))
    last = set(sorted(last)[-5:])
    assert set(queue.ids[queue.held].tolist()) == last
    assert torch.equal(queue.features[queue.held][:, 0], queue.ids[queue.held].float())
    assert torch.equal(queue.features[~queue.held], torch.zeros(5 - len(last), 3))


def test_a_restored_queue_goes_on_exactly():
    queue = fed(Queue(5, 3), 4, 3)
    restored = Queue(5, 3)
    restored.load_state_dict(queue.state_dict())
    for one in (queue, restored):
        one.enqueue(torch.full((2, 3), 9.0), torch.tensor([90, 91]))
    assert all(
        torch.equal(a, b) for a, b in zip(queue.state_dict().values(), restored.state_dict().values(), strict=True)
    )


def test_no_gradient_enters():
    queue = Queue(5, 3)
    queue.enqueue(torch.ones(2, 3, requires_grad=True), torch.arange(2))
    assert not queue.features.requires_grad
    assert queue.ids.tolist() == [0, 1, EMPTY, EMPTY, EMPTY]


@pytest.mark.parametrize(("features", "ids"), [((2, 4), 2), ((2, 3), 1), ((3,), 3)])
def test_wrong_shapes_are_refused(features, ids):
    with pytest.raises(ValueError, match="queue of width 3 cannot take"):
        Queue(5, 3).enqueue(torch.zeros(features), torch.arange(ids))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_queue_is_refused(shape):
    with pytest.raises(ValueError, match="must be positive"):
        Queue(*shape)


def enqueue_gathered():
    rank, size = dist.get_rank(), dist.get_world_size()
    way, queue = exchange.make("gather", rank, size), Queue(4, 3)
    ids = torch.arange(2) + 10 * rank
    queue.enqueue(way.gather(ids[:, None].float().expand(-1, 3)), way.gather(ids))
    return queue.state_dict()


@pytest.mark.ranks
def test_every_rank_holds_the_same(ranks):
    first, *others = ranks(3).run(enqueue_gathered)
    assert sorted(first["ids"].tolist()) == [10, 11, 20, 21]
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)
