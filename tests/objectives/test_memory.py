"""Nothing of B_local x N elements is made by any streaming objective on any exchange, forward or backward."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain import exchange, objectives
from pretrain.kernels import tiling
from pretrain.values import Features, Pairs

ROWS, D, TILE = 1024, 8, 128
STREAMING = [name for name in objectives.names() if objectives.find(name).streams]


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.elements = max([self.elements, *sizes])
        return result


def largest(name, exchange_name):
    """Elements of the largest tensor that this rank's loss and its gradients make."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tile, tiling.CPU_TILE = tiling.CPU_TILE, TILE
    try:
        objective = objectives.find(name)(objectives.find(name).Options())
        rows = [normalize(torch.randn(ROWS, D), dim=1).requires_grad_() for _ in range(2)]
        bias = torch.tensor(-10.0) if objective.init_logit_bias is not None else None
        with Largest() as seen:
            way = exchange.make(exchange_name, rank, size)
            pairs = Pairs(Features(*rows, torch.tensor(10.0), bias), way, torch.arange(ROWS) + rank * ROWS)
            torch.stack(list(objective(pairs).values())).sum().backward()
    finally:
        tiling.CPU_TILE = tile
    assert all(row.grad is not None for row in rows)
    return seen.elements


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("exchange_name", "size"), [(n, s) for n in exchange.names() for s in ((1,) if n == "local" else (2, 3))]
)
@pytest.mark.parametrize("name", STREAMING)
def test_the_largest_tensor_is_a_tile_or_the_features(ranks, name, exchange_name, size):
    columns = ROWS * size
    for elements in ranks(size).run(largest, name, exchange_name):
        assert elements <= max(TILE * TILE, columns * D)
        assert elements < ROWS * columns / 50
