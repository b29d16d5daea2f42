"""What it costs to let column gradients travel in bf16: a few roundings, by a computed bound; fp32 costs nothing.

`python tests/exchange/test_accumulators.py` prints the table of the documentation.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from pretrain import exchange, named
from pretrain.exchange import Exchange, Options
from pretrain.objectives import ops
from pretrain.values import Features, Pairs

B, D, SCALE = 32, 64, 20.0
UNIT = torch.finfo(torch.bfloat16).eps / 2
"""Largest relative error of rounding to bf16."""
WAYS = [(name, 2 if name == "hierarchical" else None) for name in exchange.names() if name != "local"]


def roundings(name, size):
    """How often, at most, a share is rounded between its rank and its owner."""
    if size == 1:
        return 1
    return {
        "gather": size + 1,  # once to travel, once in each addition of a reduce-scatter
        "streamed": size + 1,
        "ring": size - 1,  # at each visitor; the owner adds in fp32
        "bidirectional": max(1, (size - 1) // 2),
        "hierarchical": 2 + 1 + size // 2 - 1,  # a reduce-scatter in nodes of two, and visited nodes
    }[name]


@cache
def batch(size):
    """Features of a model that has learned a little: a text's cosine with its image is about 0.3."""
    generator = torch.Generator().manual_seed(size)
    image, noise = (normalize(torch.randn(size * B, D, generator=generator, dtype=torch.float64), dim=1) for _ in "it")
    return image.float(), normalize(image + 3 * noise, dim=1).float()


@cache
def shares(size):
    """[W, W] norms, in fp64, of what the rows of each rank add to the gradient of the texts of each owner."""
    image, text = (x.double() for x in batch(size))
    logits = (SCALE * image @ text.T).requires_grad_()
    own = torch.arange(len(image))
    ((cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2).backward()
    parts = torch.einsum("rij,rid->rjd", logits.grad.view(size, B, -1), SCALE * image.view(size, B, D))
    return parts.view(size, size, B, D).norm(dim=(2, 3))


def gradient(virtual, name, node, size, accumulators):
    """Of the texts, as `size` ranks find it."""

    def on(transport):
        kind = named.find(exchange, name, Exchange)
        way = kind(transport, Options(checks=0, node_size=node, accumulators=accumulators))
        rows = slice(transport.rank * B, (transport.rank + 1) * B)
        image, text = (x[rows].clone().requires_grad_() for x in batch(size))
        pairs = Pairs(Features(image, text, torch.tensor(SCALE)), way)
        pairs.mean(ops.symmetric_cross_entropy(pairs)).backward()
        return text.grad.double() / size

    return torch.cat(virtual.World(size, delay_s=0).run(on))


def error(virtual, name, node, size, accumulators):
    """[W] norms of what sums in that dtype change, by owner, and the same relative to the whole gradient."""
    wanted = gradient(virtual, name, node, size, torch.float64)
    change = gradient(virtual, name, node, size, accumulators) - wanted
    return change.view(size, B, D).norm(dim=(1, 2)), (change.norm() / wanted.norm()).item()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("name", "node"), WAYS)
def test_bf16_sums_cost_no_more_than_their_roundings(virtual, name, node, size):
    by_owner, relative = error(virtual, name, node, size, torch.bfloat16)
    # Every partial sum is at most as large as all its shares, and each rounding at most UNIT of it.
    assert (by_owner <= 1.05 * UNIT * roundings(name, size) * shares(size).sum(0)).all()
    assert UNIT / 100 < relative < 2 * UNIT


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("name", "node"), WAYS)
def test_fp32_sums_cost_nothing(virtual, name, node, size):
    assert error(virtual, name, node, size, None)[1] < torch.finfo(torch.float32).eps


def test_the_owners_share_is_not_rounded_in_a_ring(virtual):
    """Two ranks: what comes back is one share, rounded once."""
    by_owner, _ = error(virtual, "ring", None, 2, torch.bfloat16)
    assert (by_owner <= 1.01 * UNIT * shares(2).flip(0).diagonal()).all()


def table():
    """Relative errors of the text gradient, bf16 and fp32 sums."""
    name = "tests_exchange_virtual"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "virtual.py")
    virtual = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(virtual)
    for way, node in WAYS:
        for size in (2, 4, 8):
            rounded, full = (error(virtual, way, node, size, dtype)[1] for dtype in (torch.bfloat16, None))
            print(f"{way:14} W={size}  bf16 {rounded:.1e}  fp32 {full:.1e}")


if __name__ == "__main__":
    from contextlib import nullcontext

    Pairs.__dict__["trip"].lock = nullcontext()
    table()
