"""Predicted memory of every engine against what real ranks hold, and what is sent against the formulas it rests on."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import config, engines, exchange, objectives, step
from pretrain.compat import open_clip
from pretrain.errors import UserError
from pretrain.model import build
from pretrain.plan.memory import NUMBER, Layout, bytes_sent, held
from pretrain.plan.towers import PRESETS, Sizes, sizes

_path = Path(__file__).parents[1] / "engines" / "training.py"
_spec = importlib.util.spec_from_file_location("tests_engines_training", _path)
assert _spec is not None
assert _spec.loader is not None
training = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = training
_spec.loader.exec_module(training)

SMALL: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 192, "heads": 3, "layers": 6},
}
"""Tensors on both sides of DeepSpeed's threshold, none of them a large part of the model."""
ENGINES: list[tuple[str, dict[str, Any], str]] = [
    ("ddp", {}, "adamw"),
    ("ddp", {}, "lion"),
    ("fsdp2", {}, "adamw"),
    ("fsdp2", {"reshard": False}, "lion"),
    ("fsdp2", {"offload": True}, "adamw"),
    *[("deepspeed", {"zero_stage": stage}, "adamw") for stage in range(4)],
    ("deepspeed", {"zero_stage": 2, "offload": True}, "adamw"),
]


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by address."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def inside(item: Any) -> Iterator[Tensor]:
    """Every tensor of nested containers."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        yield from inside(list(item.values()))
    elif isinstance(item, list | tuple):
        for one in item:
            yield from inside(one)


def kept(engine: Any) -> dict[str, int]:
    """Bytes that an engine holds when a backward pass has ended."""
    params = list(engine.model.towers.parameters())
    masters = [param for group in engine.optimizer.param_groups for param in group["params"]]
    zero = getattr(engine.wrapped, "optimizer", None)
    spread = [getattr(zero, name, []) for name in ("averaged_gradients", "grad_partitions_flat_buffer")]
    parts = {
        "weights": storages([*params, *[param.ds_tensor for param in params if hasattr(param, "ds_tensor")]]),
        "gradients": storages([*inside([one.grad for one in (*params, *masters)]), *inside(spread)]),
        "moments": storages(inside(list(engine.optimizer.state.values()))),
        "masters": storages([*masters, *inside(getattr(zero, "fp32_partitioned_groups_flat", []))]),
    }
    known: set[int] = set()
    for name, found in parts.items():  # what is held twice under one address is held once
        parts[name] = {address: size for address, size in found.items() if address not in known}
        known |= set(found)
    return {name: sum(found.values()) for name, found in parts.items()}


def on_rank(path: str, engine: str, parallel: dict[str, Any], optimizer: str) -> dict[str, int]:
    world, method = training.world_now(), objectives.find("siglip")
    chosen = [method(method.Options())]
    device = engines.starts_on(engine, world)
    model = build(config.Model(name=path), chosen, seed=1, device=device).train()
    options, columns = config.Optim(name=optimizer), exchange.make("auto", world.rank, world.size)  # type: ignore[arg-type]
    made = engines.find(engine, world.size)(model, options, world, config.Parallel(**parallel))
    share = training.ROWS // world.size
    for seed in range(2):
        batch = training.batch_of(model, seed, False).rows(world.rank * share, (world.rank + 1) * share)
        step.plain_step(made, chosen, columns, batch)
        if not seed:
            made.step(1e-3, 1.0)
    return kept(made)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "even.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(("engine", "parallel", "optimizer"), ENGINES, ids=str)
def test_prediction_is_what_two_ranks_hold(
    ranks: Any, described: str, engine: str, parallel: dict[str, Any], optimizer: str
) -> None:
    known = {name: value for name, value in parallel.items() if name in ("reshard", "zero_stage", "offload")}
    wanted = held(sizes(SMALL, bias=True), Layout(engine, 2, **known), optimizer)
    for found in ranks(2).run(on_rank, described, engine, parallel, optimizer):
        assert sum(found.values()) == pytest.approx(wanted.kept, rel=0.02), found
        for part in ("weights", "masters", "moments"):
            assert found[part] == pytest.approx(getattr(wanted, part), rel=0.02), part
        # A tensor on the border of two ranks' pieces is whole on both, in ZeRO's buffer of gradients.
        border = 2 * NUMBER * sizes(SMALL).largest if engine == "deepspeed" else 0.02 * wanted.gradients
        assert found["gradients"] == pytest.approx(wanted.gradients, abs=border)


def test_one_process_holds_it_all(described: str) -> None:
    wanted = held(sizes(SMALL, bias=True), Layout("single"))
    found = on_rank(described, "single", {}, "adamw")
    assert found["weights"] == wanted.weights == found["gradients"]
    assert found["moments"] == pytest.approx(wanted.moments, rel=1e-3)  # counts of steps
    assert found["masters"] == 0


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_those_of_the_model(name: str) -> None:
    known = open_clip.get_model_config(name)
    assert sizes(known) == sizes(PRESETS[name])
    chosen = [objectives.find("clip")(objectives.find("clip").Options())]
    model = build(config.Model(name=name), chosen, seed=0, device=torch.device("meta")).towers
    assert sorted(param.numel() for param in model.parameters()) == sorted(sizes(known).tensors)
    matrices = sum(p.numel() for n, p in model.named_parameters() if "resblocks" in n and p.ndim == 2)
    assert sizes(known).matrices == matrices


def test_towers_of_others_are_not_guessed() -> None:
    with pytest.raises(UserError, match="only towers that are open_clip's own"):
        sizes(open_clip.get_model_config("ViT-B-16-SigLIP"))


MODEL = Sizes(rest=(600_000, 1), blocks=((200_000, 50_000),) * 3)  # 1,350,001 numbers


def test_options_move_what_they_say() -> None:
    whole, plain = MODEL.total * NUMBER, Layout("fsdp2", 8)
    assert held(MODEL, plain, average=True).average == whole // 8
    assert held(MODEL, plain, parts=2).gradients == whole
    assert held(MODEL, plain).at_work == 850_000 * 4
    assert held(MODEL, Layout("fsdp2", 8, reshard=False, gather_bytes=2)).at_work == whole // 2
    assert held(MODEL, Layout("fsdp2", 8, replicas=4)).weights == whole // 2
    away = held(MODEL, Layout("fsdp2", 8, offload=True), average=True)
    assert away.host == away.kept
    assert away.device == away.at_work
    zero = held(MODEL, Layout("deepspeed", 8, zero_stage=2, offload=True))
    assert zero.kept - zero.host == zero.weights == whole
    assert held(MODEL, Layout("deepspeed", 8, zero_stage=3)).weights == whole // 8 + 4 * 150_001


def test_optimizers() -> None:
    def moments(name: str) -> float:
        return held(sizes(PRESETS["ViT-B-16"]), Layout("ddp", 2), name).moments / 149_620_737

    found = {name: round(moments(name), 2) for name in ("adamw", "stable_adamw", "lamb", "lion", "muon", "adamw8bit")}
    assert found == {"adamw": 8, "stable_adamw": 8, "lamb": 8, "lion": 4, "muon": 4.72, "adamw8bit": 2.04}


def test_bytes_sent_are_rings_of_collectives() -> None:
    whole = MODEL.total * NUMBER
    sent = {
        "ddp": (Layout("ddp", 4), 1, 2 * 0.75),
        "ddp in bf16": (Layout("ddp", 4, reduce_bytes=2), 1, 0.75),
        "gathered twice": (Layout("fsdp2", 4), 1, 3 * 0.75),
        "kept": (Layout("fsdp2", 4, reshard=False), 1, 2 * 0.75),
        "all of a replica's, and half of the shards between": (Layout("fsdp2", 4, replicas=2), 1, 3 * 0.5 + 0.5),
        "two parts": (Layout("fsdp2", 4), 2, (2 * 3 + 1) * 0.75),
        "ZeRO 1": (Layout("deepspeed", 4, zero_stage=1), 3, 2 * 0.75),
        "ZeRO 2": (Layout("deepspeed", 4, zero_stage=2), 3, (3 + 1) * 0.75),
        "ZeRO 3": (Layout("deepspeed", 4, zero_stage=3), 1, 3 * 0.75),
        "one process": (Layout("single"), 1, 0.0),
    }
    found = {name: bytes_sent(MODEL, layout, parts) for name, (layout, parts, _) in sent.items()}
    assert found == {name: int(share * whole) for name, (_, _, share) in sent.items()}


def test_what_there_is_not_is_refused() -> None:
    for layout, optimizer, said in (
        (Layout("zero"), "adamw", "engine zero: no such engine"),
        (Layout("fsdp2", 8, replicas=3), "adamw", "parallel.replicas 3 does not divide 8 ranks"),
        (Layout("ddp", 2), "sgd", "optim.name sgd: no such optimizer"),
    ):
        with pytest.raises(UserError, match=said):
            held(MODEL, layout, optimizer)
