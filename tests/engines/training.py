"""Some optimizer steps of a small dual encoder under an engine, for tests that compare engines. Runs on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain import config, engines, exchange, objectives, step
from pretrain.ema import Average
from pretrain.engines.shards import whole
from pretrain.model import DualEncoder, build
from pretrain.values import Batch, StepReport
from pretrain.world import World

CPU = torch.device("cpu")
ROWS = 12


@dataclass(frozen=True)
class Case:
    """What is run."""

    engine: str
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_batch: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    objective: str = "siglip"
    steps: int = 5
    first: int = 0
    """Number of the first step."""
    fp64: bool = False
    further: bool = False
    """Whether batches have further views and captions, which pass the towers too."""
    exchange: str = "auto"


@dataclass
class Result:
    """What one rank saw; weights, average and moments on rank 0 alone."""

    losses: list[float]
    norms: list[list[float]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    moments: dict[str, Tensor]
    spread: float
    """Share of the model's numbers that this rank holds."""


def world_now() -> World:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return World(rank, size, rank, CPU)


def batch_of(model: DualEncoder, seed: int, further: bool) -> Batch:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(seed)
    height, width = model.image_spec.size
    length = model.architecture.towers["text_cfg"].get("context_length", 77)

    def images(*shape: int) -> Tensor:
        return torch.randint(0, 256, (*shape, 3, height, width), generator=generator, dtype=torch.uint8)

    def texts(*shape: int) -> Tensor:
        return torch.randint(1, 40, (*shape, length), generator=generator)

    extra = {"image_views": images(ROWS, 1), "captions": texts(ROWS, 2)} if further else {}
    return Batch(images(ROWS), texts(ROWS), torch.arange(ROWS), tuple(map(str, range(ROWS))), (), extra)


def on_rank(case: dict[str, Any], state: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None) -> dict[str, Any]:
    """`run`, as plain dictionaries, which cross processes that know this file by other names."""
    return vars(run(Case(**case), state))


def run(case: Case, state: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None) -> Result:
    """Train from seeded weights, or from `state` (weights and moments); step n takes the batch of seed n."""
    world, method = world_now(), objectives.find(case.objective)
    chosen = [method(method.Options())]
    device = engines.starts_on(case.engine, world)
    model = build(config.Model(**({"name": "debug-tiny"} | case.model)), chosen, seed=1, device=device)
    model = (model.double() if case.fp64 else model).train()
    optim = config.Optim(**({"lr": 1e-2, "ema_decay": 0.9} | case.optim))
    engine = engines.find(case.engine, world.size)(model, optim, world, config.Parallel(**case.parallel))
    average = Average(model.towers, 0.9)
    if state is not None:
        engine.load(*state)
    columns, share = exchange.make(case.exchange, world.rank, world.size), ROWS // world.size
    losses, norms, gradients = [], [], {}
    for seed in range(case.first, case.first + case.steps):
        batch = batch_of(model, seed, case.further).rows(world.rank * share, (world.rank + 1) * share)
        if case.micro_batch is None:
            terms, features = step.plain_step(engine, chosen, columns, batch)
        else:
            terms, features = step.cached_step(engine, chosen, columns, batch, case.micro_batch)
        gradients = gradients or whole_gradients(model)
        found = engine.step(1e-2, 1.0)
        average.update(model.towers)
        norms.append([float(found.total), float(found.image), float(found.text)])
        losses.append(mean(StepReport.of(terms, features, found).loss))
    params = list(model.towers.parameters())
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in params)
    states = map(whole, (engine.model_state(), average.state(), engine.optimizer_state()))
    weights, averaged, moments = ({k: v.clone() for k, v in tensors.items()} for tensors in states)
    return Result(losses, norms, gradients, weights, averaged, moments, held / sum(p.numel() for p in params))


def whole_gradients(model: DualEncoder) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.towers.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in grads.items()}


def mean(value: Tensor) -> float:
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total)


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Largest difference relative to the largest number of its tensor, and where.

    A tensor of nothing but rounding (the gradient of attention's key bias is zero) is measured by the largest of all.
    """
    assert found.keys() == wanted.keys()
    assert wanted
    least = 1e-4 * max(float(value.double().abs().max()) for value in wanted.values() if value.numel())
    differences = {
        name: float((found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=least))
        for name, value in wanted.items()
        if value.numel()
    }
    return max((difference, name) for name, difference in differences.items())


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Euclidean norm of all differences, relative to that of all numbers; counts of steps must be equal."""
    assert found.keys() == wanted.keys()
    apart = size = 0.0
    for name, value in wanted.items():
        if name.startswith("step/"):
            assert torch.equal(found[name], value), name
        else:
            apart += float((found[name].double() - value.double()).square().sum())
            size += float(value.double().square().sum())
    return (apart / size) ** 0.5
