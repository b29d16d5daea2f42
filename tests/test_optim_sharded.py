"""Every optimizer over parameters that are spread by fully_shard: the weights are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain import optim
from pretrain.config import Optim

KINDS = ("adamw", "stable_adamw", "lion", "lamb", "muon")


class Towers(nn.Module):
    """Rows that do not divide evenly over two ranks among them."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.layers = nn.Sequential(nn.Linear(12, 15), nn.LayerNorm(15), nn.Linear(15, 8))
        self.token_embedding = nn.Embedding(7, 8)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 12] -> []"""
        logits: Tensor = self.visual.layers(images) @ self.token_embedding.weight.t()
        return (2 * logits).square().mean()


def trained(model: nn.Module, name: str, step: Any) -> None:
    optimizer = optim.build(model, Optim(name=name, lr=0.01, weight_decay=0.3))
    for number in range(4):
        torch.manual_seed(number)
        optim.set_rate(optimizer, 0.01 / (1 + number))
        step(torch.randn(40, 12, dtype=torch.float64) * (10.0 if number == 2 else 1.0))
        optimizer.step()
        optimizer.zero_grad()


def whole(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Towers().double()
    trained(model, name, lambda images: model(images).backward())
    return {key: value.detach() for key, value in model.named_parameters()}


def spread(name: str) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Towers().double()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    fully_shard(model.visual.layers)
    fully_shard(model)
    trained(model, name, lambda images: model(images).backward())
    return {key: value.full_tensor().detach() for key, value in model.named_parameters()}


@pytest.mark.ranks
@pytest.mark.parametrize("name", KINDS)
def test_spread_weights_move_as_whole_ones(name: str, ranks: Any) -> None:
    expected = whole(name)
    torch.manual_seed(0)
    start = dict(Towers().double().named_parameters())
    # Share of the way. Muon multiplies in bf16, whose products round differently where the sums are cut.
    tolerance = 0.05 if name == "muon" else 1e-12
    for found in ranks(2).run(spread, name):
        for key, value in expected.items():
            assert (found[key] - value).norm() <= tolerance * (value - start[key]).norm(), (name, key)
