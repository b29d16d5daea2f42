"""From a run folder and shards to a result file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint, config, model
from pretrain.checkpoint import State
from pretrain.data.packing.kinds import pack_digits
from pretrain.errors import UserError
from pretrain.evaluate import evaluate, measure, names
from pretrain.world import World, environment

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


def encoder(seed: int) -> model.DualEncoder:
    return model.build(config.Model(name="debug-tiny"), Clip(), seed, CPU)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    pack_digits(folder)
    return folder


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint, which holds an average that differs from the weights."""
    folder = tmp_path_factory.mktemp("run")
    text = (
        f"data: {{train: ['{shards}/train/*.tar'], eval: ['{shards}/eval/*.tar'], workers: 0}}\n"
        "model: {name: debug-tiny}\ntrain: {samples: 12, global_batch: 4}\noptim: {ema_decay: 0.9}\n"
    )
    average = {f"towers.{name}": value for name, value in encoder(2).towers.state_dict().items()}
    other = {"step/x": torch.ones(1)}
    state = State(12, 48, dict(encoder(1).towers.state_dict()), average, other, {}, {"t": torch.ones(1)})
    checkpoint.save(folder, state, HERE, text)
    return folder


def measured(seed: int, shards: Path, task: str) -> dict[str, Any]:
    held_out = config.Data(eval=(f"{shards}/eval/*.tar",), workers=0)
    return measure(encoder(seed), task, held_out, HERE)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["zero_shot", "retrieval"])
def test_a_run_is_measured_with_its_average(run: Path, shards: Path, task: str) -> None:
    result = evaluate(run, task, world=HERE, workers=0)
    expected = measured(2, shards, task)
    assert {name: result[name] for name in expected} == expected
    assert (result["task"], result["step"], result["average"]) == (task, 12, True)
    stored = json.loads((run / "eval" / f"{task}_00000012.json").read_text())
    assert stored.pop("seconds") >= 0
    assert stored == result
    assert list((run / "eval").glob(".*")) == []


@pytest.mark.slow
def test_the_plain_weights_are_another_result(run: Path, shards: Path) -> None:
    result = evaluate(run / "checkpoints" / "step_00000012", "zero_shot", world=HERE, average=False, workers=0)
    assert result["top1"] == measured(1, shards, "zero_shot")["top1"]
    assert result["average"] is False
    assert (run / "eval" / "zero_shot_00000012_plain.json").is_file()


def test_measuring_leaves_training_mode_alone(shards: Path) -> None:
    training = encoder(1).train()
    measure(training, "zero_shot", config.Data(eval=(f"{shards}/eval/*.tar",), workers=0), HERE)
    assert training.training
    assert all(parameter.grad is None for parameter in training.parameters())


def test_names() -> None:
    assert {"zero_shot", "retrieval"} <= set(names())
    assert not {"base", "ops"} & set(names())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "zeroshot"}, "did you mean zero_shot"),
        ({"data": ("nowhere/*.tar",)}, r"data.eval: 'nowhere/\*.tar' names no file"),
        ({"classes": "nowhere.json"}, r"classes nowhere.json: not readable"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_mistakes_are_told(run: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        evaluate(run, options.pop("task", "zero_shot"), world=HERE, **options)
    assert "\n" not in str(caught.value)


def test_a_run_without_held_out_shards_is_told(tmp_path: Path) -> None:
    state = State(1, 4, dict(encoder(1).towers.state_dict()), None, {"step/x": torch.ones(1)}, {}, {"t": torch.ones(1)})
    checkpoint.save(tmp_path, state, HERE, "data: {train: [a.tar]}\nmodel: {name: debug-tiny}\ntrain: {samples: 4}\n")
    with pytest.raises(UserError, match=r"data.eval is empty"):
        evaluate(tmp_path, "zero_shot", world=HERE)
    with pytest.raises(UserError, match="no averaged weights"):
        evaluate(tmp_path, "zero_shot", world=HERE, average=True)


def on_a_rank(run: str) -> dict[str, Any]:
    rank, size, _ = environment()
    torch.set_num_threads(1)
    return evaluate(run, "zero_shot", world=World(rank, size, rank, CPU), workers=0)


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_measure_what_one_does(run: Path, ranks: Any) -> None:
    first, second = ranks(2).run(on_a_rank, str(run))
    assert first == second
    one = evaluate(run, "zero_shot", world=HERE, workers=0)
    assert first["world_size"] == 2
    assert first["samples"] == one["samples"]
    assert first["top1"] == pytest.approx(one["top1"], abs=1 / one["samples"])
