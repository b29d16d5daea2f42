"""The gradient contract: W ranks give the loss and every gradient of one process, for every objective and exchange.

A new file in objectives/ or exchange/ is taken in by itself. fp64, 1e-10; towers, scale and bias apart.
"""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import linear, normalize

from pretrain import exchange, objectives
from pretrain.values import Features, Pairs

N, WIDTH, D = 24, 5, 4
OPTIONS = [(name, {}) for name in objectives.names()] + [("clip", {"label_smoothing": 0.2, "weight": 3.0})]
SERVED = [(name, size) for name in exchange.names() for size in ((1,) if name == "local" else (1, 2, 3, 4))]


def batch():
    """[N, WIDTH] images and texts, and a parameter of each kind: the same on every rank."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images, texts = random(N, WIDTH), random(N, WIDTH)
    towers = {"image": random(D, WIDTH), "text": random(D, WIDTH)}
    return images, texts, towers


def step(name, options, exchange_name):
    """This rank's share of one step, averaged over ranks as an engine does: loss and gradient of each parameter."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    method = objectives.find(name)
    objective = method(method.Options(**options))
    assert not method.needs, f"{name} needs {sorted(method.needs)}: give them to this test's features"
    images, texts, parameters = batch()
    bias = objective.init_logit_bias
    parameters["logit_scale"] = torch.tensor(objective.init_logit_scale, dtype=torch.float64).log()
    parameters["logit_bias"] = torch.tensor(-0.5 if bias is None else bias, dtype=torch.float64)
    for value in parameters.values():
        value.requires_grad_()
    own = slice(rank * N // size, (rank + 1) * N // size)
    rows = [normalize(linear(x[own], parameters[key]), dim=1) for x, key in ((images, "image"), (texts, "text"))]
    features = Features(*rows, parameters["logit_scale"].exp(), parameters["logit_bias"] if bias is not None else None)
    pairs = Pairs(features, exchange.make(exchange_name, rank, size), torch.arange(N)[own])
    loss = torch.stack(list(objective(pairs).values())).sum()
    loss.backward()
    found = {"loss": loss.detach()} | {k: v.grad for k, v in parameters.items() if v.grad is not None}
    for value in found.values():
        if size > 1:
            dist.all_reduce(value)
            value /= size
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(("exchange_name", "size"), SERVED)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_ranks_equal_one_process(ranks, name, options, exchange_name, size):
    wanted = step(name, options, "local")
    for found in ranks(size).run(step, name, options, exchange_name):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            difference = (found[key] - value).abs().max() / value.abs().max()
            assert difference < 1e-10, f"{key}: relative difference {difference:.1e}"


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_every_parameter_has_a_gradient_to_compare(name, options):
    bias = {"logit_bias"} if objectives.find(name).init_logit_bias is not None else set()
    assert step(name, options, "local").keys() == {"loss", "image", "text", "logit_scale"} | bias
