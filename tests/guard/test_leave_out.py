"""A step that is left out leaves weights, moments and step counts bit for bit, by every optimizer and engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import optim, step

_spec = importlib.util.spec_from_file_location("guard_engines", Path(__file__).parents[1] / "engines" / "training.py")
assert _spec is not None
assert _spec.loader is not None
training: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = training
_spec.loader.exec_module(training)


def judged(engine: str, name: str, keep: list[bool], parallel: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and moments after a step for each entry of `keep`; gradients of those left out are no numbers."""
    from pretrain import config, engines, exchange, objectives
    from pretrain.model import build

    world, method = training.world_now(), objectives.find("clip")
    chosen = [method(method.Options())]
    model = build(config.Model(name="debug-tiny"), chosen, seed=1, device=engines.starts_on(engine, world)).train()
    options = config.Optim(name=name, lr=1e-2)
    made = engines.find(engine, world.size)(model, options, world, config.Parallel(**parallel))
    columns, share = exchange.make("auto", world.rank, world.size), training.ROWS // world.size
    for number, taken in enumerate(keep):
        batch = training.batch_of(model, 0 if taken else number, False)
        step.plain_step(made, chosen, columns, batch.rows(world.rank * share, (world.rank + 1) * share))
        for param in model.towers.parameters():
            if not taken and param.grad is not None:
                param.grad.mul_(torch.nan)
        norms = made.step(1e-2, 1.0, lambda found, taken=taken: found.total.new_tensor(taken, dtype=torch.bool))
        assert bool(norms.total.isfinite()) or not taken
    weights, moments = made.model_state(), made.optimizer_state()
    found = {**weights, **{f"moment {name}": value for name, value in moments.items()}}
    return {name: _local(tensor).clone() for name, tensor in found.items()}


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["adamw", "stable_adamw", "lion", "lamb", "muon"])
def test_an_optimizer_leaves_a_step_out(name: str) -> None:
    """The first one, when there is no state yet, and one between others."""
    assert same(judged("single", name, [False, True, False, True], {}), judged("single", name, [True, True], {}))


def on_rank(engine: str, name: str, parallel: dict[str, Any]) -> tuple[bool, int]:
    """Whether all is the same, and how much there is; ranks other than 0 may hold nothing whole."""
    found = judged(engine, name, [True, False, True], parallel)
    return same(found, judged(engine, name, [True, True], parallel)), len(found)


CASES = [("ddp", "adamw", {}), ("fsdp2", "adamw", {}), ("fsdp2", "lion", {})]


@pytest.mark.ranks
@pytest.mark.parametrize(("engine", "name", "parallel"), CASES)
def test_an_engine_leaves_a_step_out_on_every_rank(
    ranks: Any, engine: str, name: str, parallel: dict[str, Any]
) -> None:
    assert all(ranks(2).run(on_rank, engine, name, parallel))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, True), (2, False), (3, False), (3, True)])
def test_deepspeed_leaves_a_step_out_on_every_rank(ranks: Any, stage: int, offload: bool) -> None:
    pytest.importorskip("deepspeed")
    found = ranks(2).run(on_rank, "deepspeed", "adamw", {"zero_stage": stage, "offload": offload})
    assert found[0][1] > 100
    assert all(equal for equal, _ in found)


def test_only_the_fused_kernel_is_told_on_the_device() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    assert optim.reads_on_device(torch.optim.AdamW([param], fused=True))
    assert not optim.reads_on_device(torch.optim.AdamW([param], fused=False))
    assert not optim.reads_on_device(torch.optim.SGD([param]))
