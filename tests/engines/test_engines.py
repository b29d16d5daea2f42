"""Every engine trains the same model: losses, gradients, norms, weights, average and moments of one process.

Tolerances are several times what was measured on CPU ranks (in brackets). In fp64 engines differ by the order of sums
alone. Weights are compared by their distance over all of the model, since AdamW divides noise by noise where a gradient
is zero but for rounding, as that of the bias of attention's keys is.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from pretrain import config, engines, objectives
from pretrain.errors import UserError
from pretrain.model import build
from pretrain.towers.architecture import SHIPPED

_spec = importlib.util.spec_from_file_location("tests_engines_training", Path(__file__).with_name("training.py"))
assert _spec is not None
assert _spec.loader is not None
training = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = training
_spec.loader.exec_module(training)

LOCKED = {"lock_image": 1}
BF16 = {"precision": "bf16"}
SPREAD = {"ddp": 1.0, "fsdp2": 0.5}


def single(**case: Any) -> Any:
    return training.run(training.Case("single", **case))


def on_ranks(ranks: Any, size: int, engine: str, parallel: dict[str, Any], **case: Any) -> list[Any]:
    found = ranks(size).run(training.on_rank, {"engine": engine, "parallel": parallel} | case)
    return [training.Result(**result) for result in found]


def assert_same(found: list[Any], wanted: Any, *, losses: float, gradients: float, weights: float) -> None:
    """On every rank.

    Args:
        losses: relative tolerance of every step's loss.
        gradients: of the first step's gradients, largest difference by the largest number of a tensor.
        weights: distance of weights, average and moments after the last step; ten times that for norms.
    """
    main = found[0]
    for rank in found:
        assert rank.losses == main.losses
        assert rank.norms == main.norms
    assert main.losses == pytest.approx(wanted.losses, rel=losses)
    difference, name = training.furthest(main.gradients, wanted.gradients)
    assert difference < gradients, f"gradient of {name}: {difference:.1e}"
    for norms, expected in zip(main.norms, wanted.norms, strict=True):
        assert norms == pytest.approx(expected, rel=10 * weights)
    for kind in ("weights", "average", "moments"):
        distance = training.distance(getattr(main, kind), getattr(wanted, kind))
        assert distance < weights, f"{kind}: {distance:.1e}"


@pytest.mark.ranks
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_five_steps_equal_one_process_in_fp32(ranks: Any, engine: str, micro_batch: int | None) -> None:
    wanted = single(micro_batch=micro_batch)
    found = on_ranks(ranks, 2, engine, {}, micro_batch=micro_batch)
    assert wanted.losses[-1] < wanted.losses[0]
    assert_same(found, wanted, losses=3e-6, gradients=3e-6, weights=1e-5)  # [4e-7, 7e-7, 9e-7]
    assert found[0].spread == pytest.approx(SPREAD[engine], abs=1e-3)


@pytest.mark.ranks
@pytest.mark.parametrize("objective", objectives.names())
@pytest.mark.parametrize(
    ("engine", "size", "micro_batch", "exchange"),
    [("ddp", 2, None, "gather"), ("fsdp2", 2, None, "ring"), ("fsdp2", 2, 3, "gather")],
)
def test_the_gradient_contract_holds(
    ranks: Any, engine: str, size: int, micro_batch: int | None, exchange: str, objective: str
) -> None:
    """Towers, scale and bias, in fp64; further images and captions pass the towers with the pairs."""
    case = {"fp64": True, "steps": 1, "objective": objective, "micro_batch": micro_batch, "further": True}
    found = on_ranks(ranks, size, engine, {}, exchange=exchange, **case)
    bias = {"logit_bias"} if objectives.find(objective).init_logit_bias is not None else set()
    assert {"logit_scale", "visual.proj", "text_projection"} | bias <= found[0].gradients.keys()
    assert_same(found, single(**case), losses=1e-12, gradients=1e-12, weights=1e-12)  # [8e-16, 2e-15, 3e-15]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_replicas_of_shards(ranks: Any, micro_batch: int | None) -> None:
    """HSDP: two copies of the model, each on two ranks."""
    case = {"fp64": True, "micro_batch": micro_batch}
    found = on_ranks(ranks, 4, "fsdp2", {"replicas": 2}, **case)
    assert_same(found, single(**case), losses=1e-12, gradients=1e-12, weights=1e-12)
    assert found[0].spread == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_that_parameters_do_not_divide_by(ranks: Any) -> None:
    found = on_ranks(ranks, 3, "fsdp2", {}, fp64=True)
    assert_same(found, single(fp64=True), losses=1e-12, gradients=1e-12, weights=1e-12)
    assert sum(rank.spread for rank in found) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("engine", "parallel", "case"),
    [
        ("ddp", {"static_graph": True}, {}),
        ("fsdp2", {"reshard": False}, {"micro_batch": 3}),
        ("fsdp2", {"offload": True}, {}),
        ("fsdp2", {}, {"model": LOCKED, "micro_batch": 3}),
        ("fsdp2", {}, {"model": {"lock_text": 0}}),
        ("fsdp2", {}, {"model": {"grad_checkpointing": "all"}, "micro_batch": 3}),
        ("fsdp2", {}, {"optim": {"name": "stable_adamw"}}),
        ("fsdp2", {}, {"optim": {"name": "lamb"}}),
    ],
    ids=str,
)
def test_options_change_nothing(ranks: Any, engine: str, parallel: dict[str, Any], case: dict[str, Any]) -> None:
    found = on_ranks(ranks, 2, engine, parallel, fp64=True, **case)
    assert_same(found, single(fp64=True, **case), losses=1e-12, gradients=1e-12, weights=1e-12)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("engine", "parallel", "case", "tolerances"),
    [
        # The same rows in every pass of a tower: only what one step leaves to the next is rounded differently.
        ("ddp", {}, {"model": BF16, "micro_batch": 3}, (2e-3, 3e-6, 1e-2)),  # [3e-4, 3e-7, 2e-3]
        ("fsdp2", {}, {"model": BF16, "micro_batch": 3}, (2e-3, 3e-6, 1e-2)),  # [3e-4, 3e-7, 2e-3]
        # Sums over other rows, in bf16; weights and the stream of residuals rounded; gradients summed in bf16.
        ("fsdp2", {}, {"model": BF16}, (3e-3, 0.2, 5e-2)),  # [4e-4, 6e-2, 1e-2]
        ("fsdp2", {"gather_dtype": "bf16"}, {"model": BF16, "micro_batch": 3}, (5e-2, 0.1, 0.2)),  # [1e-2, 2e-2, 5e-2]
        ("ddp", {"reduce_dtype": "bf16"}, {}, (5e-3, 2e-2, 5e-2)),  # [1e-3, 6e-3, 1e-2]
        ("fsdp2", {"reduce_dtype": "bf16"}, {"micro_batch": 3}, (5e-3, 2e-2, 5e-2)),  # [1e-3, 7e-3, 1e-2]
        # Newton-Schulz iterates in bf16, over shards in another order.
        ("fsdp2", {}, {"optim": {"name": "muon"}}, (3e-3, 3e-6, 2e-2)),  # [3e-4, 5e-7, 4e-3]
    ],
    ids=str,
)
def test_what_rounds_stays_near(
    ranks: Any, engine: str, parallel: dict[str, Any], case: dict[str, Any], tolerances: tuple[float, float, float]
) -> None:
    found = on_ranks(ranks, 2, engine, parallel, **case)
    losses, gradients, weights = tolerances
    assert_same(found, single(**case), losses=losses, gradients=gradients, weights=weights)


def towers(folder: Path, kind: str) -> str:
    """A description of small timm and Hugging Face towers with random weights."""
    tiny = json.loads((SHIPPED / "debug-tiny.json").read_text())
    vision = {"timm_model_name": kind, "timm_pool": "token" if "vit" in kind else "avg", "image_size": 64}
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformers.RobertaConfig(vocab_size=4000, max_position_embeddings=40, **shape).save_pretrained(folder / "text")
    text = {"hf_model_name": str(folder / "text"), "hf_model_pretrained": False, "hf_proj_type": "linear"}
    text |= {"hf_pooler_type": "mean_pooler", "context_length": 16}
    path = folder / f"{kind}-roberta.json"
    path.write_text(json.dumps(tiny | {"vision_cfg": vision, "text_cfg": text}))
    return str(path)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "checkpointing"), [("test_vit", "all"), ("test_convnext", "off")])
def test_towers_of_timm_and_hugging_face(ranks: Any, tmp_path: Path, kind: str, checkpointing: str) -> None:
    model = {"name": towers(tmp_path, kind), "grad_checkpointing": checkpointing}
    case = {"fp64": True, "steps": 3, "micro_batch": 3, "model": model}
    found = on_ranks(ranks, 2, "fsdp2", {}, **case)
    assert_same(found, single(**case), losses=1e-12, gradients=1e-11, weights=1e-11)
    assert found[0].spread < 0.55
    narrow = {"micro_batch": 3, "steps": 3, "model": model | BF16}
    found = on_ranks(ranks, 2, "fsdp2", {"gather_dtype": "bf16"}, **narrow)
    assert found[0].losses == pytest.approx(single(**narrow).losses, rel=5e-2)


@pytest.mark.ranks
def test_a_start_has_the_weights_of_one_process(ranks: Any) -> None:
    """Bit for bit, though all ranks but one have built no more than shapes."""
    found = on_ranks(ranks, 2, "fsdp2", {}, steps=0)
    wanted = single(steps=0).weights
    assert found[0].weights.keys() == wanted.keys()
    assert all(torch.equal(found[0].weights[name], value) for name, value in wanted.items())
    assert found[1].weights == {}, "the whole model is on rank 0 alone"


@pytest.mark.ranks
@pytest.mark.parametrize(("first", "second"), [("fsdp2", "fsdp2"), ("single", "fsdp2"), ("fsdp2", "single")])
def test_going_on_by_name(ranks: Any, first: str, second: str) -> None:
    """Three steps and two more are five; on the same engine bit for bit."""

    def part(engine: str, state: Any = None, **case: Any) -> Any:
        if engine == "single":
            return training.run(training.Case("single", fp64=True, **case), state)
        return training.Result(**ranks(2).run(training.on_rank, {"engine": engine, "fp64": True} | case, state)[0])

    whole, start = part(first), part(first, steps=3)
    rest = part(second, (start.weights, start.moments), steps=2, first=3)
    if first == second:
        assert all(torch.equal(rest.weights[name], value) for name, value in whole.weights.items())
        assert all(torch.equal(rest.moments[name], value) for name, value in whole.moments.items())
    assert training.distance(rest.weights, whole.weights) < 1e-12
    assert training.distance(rest.moments, whole.moments) < 1e-12


def refused(replicas: int) -> str:
    try:
        training.run(training.Case("fsdp2", {"replicas": replicas}))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_that_ranks_do_not_fit_are_refused(ranks: Any, replicas: int) -> None:
    for said in ranks(2).run(refused, replicas):
        assert f"parallel.replicas {replicas} does not leave 2 ranks" in said


def waits(engine: str, parallel: dict[str, Any]) -> dict[str, float]:
    """Seconds that each process group of a new engine waits for the other ranks, by its description."""
    world = replace(training.world_now(), timeout=timedelta(seconds=77))
    clip, device = objectives.find("clip"), engines.starts_on(engine, world)
    model = build(config.Model(name="debug-tiny"), [clip(clip.Options())], seed=1, device=device)
    before = set(distributed_c10d._world.pg_map)
    engines.find(engine, world.size)(model, config.Optim(), world, config.Parallel(**parallel))
    made = [group for group in distributed_c10d._world.pg_map if group not in before]
    return {group.group_name: group._get_backend(training.CPU).options._timeout.total_seconds() for group in made}


@pytest.mark.slow
@pytest.mark.ranks
def test_every_group_waits_as_long_as_the_run_says(ranks: Any) -> None:
    """torch gives a further group its own half hour, whatever train.timeout_s is."""
    for found in ranks(4).run(waits, "fsdp2", {"replicas": 2}):
        assert list(found.values()) == [77.0, 77.0]


def test_one_process_has_nothing_to_spread() -> None:
    with pytest.raises(UserError, match="engine fsdp2 carries at least 2 ranks, not 1"):
        training.run(training.Case("fsdp2"))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("engine", "micro_batch"), [("ddp", None), ("ddp", 2), ("fsdp2", None), ("deepspeed", None)], ids=str
)
def test_three_ranks_go_on_bitwise(ranks: Any, engine: str, micro_batch: int | None) -> None:
    """Three numbers have two sums: a gradient must be added up in the order in which a calm run adds it."""
    case: dict[str, Any] = {"micro_batch": micro_batch, "optim": {"ema_decay": None}}
    calm = on_ranks(ranks, 3, engine, {}, steps=6, **case)
    before = on_ranks(ranks, 3, engine, {}, steps=3, **case)
    state = (before[0].weights, before[0].moments)
    given = {"engine": engine, "parallel": {}, "steps": 3, "first": 3} | case
    after = [training.Result(**each) for each in ranks(3).run(training.on_rank, given, state)]
    assert [result.losses for result in after] == [result.losses[3:] for result in calm]
    for name, value in calm[0].weights.items():
        assert torch.equal(after[0].weights[name], value), name
