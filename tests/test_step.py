"""The step: the cached-feature form equals the plain one, dropout included, and counts scale and bias once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain import config, engines, exchange, objectives, step
from pretrain.model import DualEncoder, build
from pretrain.values import Batch, Features, Pairs
from pretrain.world import World

CPU = torch.device("cpu")


def encoder(objective: str, dropout: float = 0.0) -> tuple[DualEncoder, list]:
    """A tiny fp64 dual encoder with both kinds of head, optionally dropping out its features."""
    chosen = [objectives.find(objective)(objectives.find(objective).Options())]
    model = build(config.Model(name="debug-tiny"), chosen, seed=1, device=CPU).double().train()
    if dropout:
        model.towers.visual.ln_post = nn.Sequential(model.towers.visual.ln_post, nn.Dropout(dropout))
        model.towers.ln_final = nn.Sequential(model.towers.ln_final, nn.Dropout(dropout))
    return model, chosen


def batch_of(model: DualEncoder, rows: int, start: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(start)
    height, width = model.image_spec.size
    images = torch.randint(0, 256, (rows, 3, height, width), generator=generator, dtype=torch.uint8)
    texts = torch.randint(1, 400, (rows, model.towers.context_length), generator=generator)
    return Batch(images, texts, torch.arange(start, start + rows), tuple(map(str, range(rows))))


def engine_of(model: DualEncoder, world: World) -> Any:
    return engines.find("auto", world.size)(model, config.Optim(), world)


def gradients(model: DualEncoder) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in model.towers.named_parameters() if param.grad is not None}


def single() -> tuple[World, Any]:
    return World(0, 1, 0, CPU), exchange.make("auto", 0, 1)


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    assert {"logit_scale"} <= expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max().clamp(min=1e-12), name


@pytest.mark.parametrize("objective", objectives.names())
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 12])
def test_cached_step_equals_plain_step(objective: str, micro_batch: int) -> None:
    world, columns = single()
    found = []
    for size in (None, micro_batch):
        model, chosen = encoder(objective)
        engine, batch = engine_of(model, world), batch_of(model, 12)
        if size is None:
            terms, _ = step.plain_step(engine, chosen, columns, batch)
        else:
            terms, _ = step.cached_step(engine, chosen, columns, batch, size)
        found.append((step.total(terms).detach(), gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=0)
    assert_equal_gradients(found[1][1], found[0][1], 1e-9)


@pytest.mark.parametrize("objective", objectives.names())
def test_cached_step_replays_dropout(objective: str) -> None:
    """With dropout the truth is one graph over all parts, each seeing the masks of the first pass."""
    world, columns = single()
    model, chosen = encoder(objective, dropout=0.5)
    batch = batch_of(model, 12)
    torch.manual_seed(5)
    parts = [model(part.images, part.texts) for part in batch.split(4)]
    whole = Features.of(
        parts[0].tensors() | {key: torch.cat([part.rows()[key] for part in parts]) for key in ("image", "text")}
    )
    step.total(step.loss_terms(chosen, Pairs(whole, columns, batch.ids))).backward()
    expected, after = gradients(model), torch.get_rng_state()

    model.zero_grad()
    torch.manual_seed(5)
    step.cached_step(engine_of(model, world), chosen, columns, batch, 4)
    assert_equal_gradients(gradients(model), expected, 1e-9)
    assert torch.equal(torch.get_rng_state(), after), "the stream must go on as if each tower had run once"


@pytest.mark.parametrize("objective", objectives.names())
def test_scale_and_bias_are_counted_once(objective: str) -> None:
    """Their gradient must not grow with the number of parts (a peer's grows k-fold)."""
    world, columns = single()
    seen = {}
    for micro_batch in (12, 2, 1):
        model, chosen = encoder(objective)
        step.cached_step(engine_of(model, world), chosen, columns, batch_of(model, 12), micro_batch)
        seen[micro_batch] = {n: g for n, g in gradients(model).items() if n.startswith("logit_")}
    for name, value in seen[12].items():
        torch.testing.assert_close(seen[1][name], value, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(seen[2][name], value, rtol=1e-9, atol=1e-15)


def test_locked_tower_trains_the_other_through_the_cached_step() -> None:
    world, columns = single()
    chosen = [objectives.find("clip")(objectives.find("clip").Options())]
    found = []
    for size in (None, 4):
        model = build(config.Model(name="debug-tiny", lock_image=0), chosen, seed=1, device=CPU).double().train()
        engine, batch = engine_of(model, world), batch_of(model, 12)
        if size is None:
            step.plain_step(engine, chosen, columns, batch)
        else:
            step.cached_step(engine, chosen, columns, batch, size)
        found.append(gradients(model))
    assert not any(name.startswith("visual.") for name in found[0])
    assert_equal_gradients(found[1], found[0], 1e-9)


def test_terms_of_one_name_are_kept_apart() -> None:
    class Other(nn.Module):
        def forward(self, pairs: Pairs) -> dict[str, Tensor]:
            return {"clip": pairs.image.sum() * 0 + 2.0}

    model, chosen = encoder("clip")
    _, columns = single()
    batch = batch_of(model, 4)
    terms = step.loss_terms([*chosen, Other()], Pairs(model(batch.images, batch.texts), columns))  # type: ignore[list-item]
    assert len(terms) == 2
    assert step.total(terms) == sum(terms.values())


def on_ranks(objective: str, micro_batch: int | None) -> dict[str, Tensor]:
    """Gradients of this rank's share of a fixed batch of 12, as the ddp engine averages them."""
    import torch.distributed as dist

    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), CPU)
    model, chosen = encoder(objective)
    engine, columns = engine_of(model, world), exchange.make("auto", world.rank, world.size)
    share = 12 // world.size
    batch = batch_of(model, 12).rows(world.rank * share, (world.rank + 1) * share)
    if micro_batch is None:
        step.plain_step(engine, chosen, columns, batch)
    else:
        step.cached_step(engine, chosen, columns, batch, micro_batch)
    return gradients(model)


@pytest.mark.ranks
@pytest.mark.parametrize("objective", objectives.names())
@pytest.mark.parametrize(("size", "micro_batch"), [(2, None), (2, 2), (3, 1)])
def test_ranks_equal_one_process(objective: str, size: int, micro_batch: int | None, ranks: Any) -> None:
    world, columns = single()
    model, chosen = encoder(objective)
    step.plain_step(engine_of(model, world), chosen, columns, batch_of(model, 12))
    for found in ranks(size).run(on_ranks, objective, micro_batch):
        assert_equal_gradients(found, gradients(model), 1e-9)
