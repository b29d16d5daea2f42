"""A DeepSpeed JSON beside our knobs: what is merged, what is refused, and in which words. DeepSpeed is not needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain import config, runfile
from pretrain.checks import check_world
from pretrain.engines import deepspeed_config
from pretrain.errors import UserError


def merged(folder: Path, tree: dict[str, Any], optim: dict[str, Any], **more: Any) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(json.dumps(tree))
    parallel = config.Parallel(deepspeed=str(path), **more)
    return deepspeed_config.merge(parallel, config.Optim(**optim), "fp32")


def test_without_a_file() -> None:
    found = deepspeed_config.merge(config.Parallel(), config.Optim(), "bf16")
    assert found["zero_optimization"] == {"stage": 2, "memory_efficient_linear": False}
    assert found["gradient_clipping"] == 0.0
    assert "bf16" not in found, "autocast over fp32 weights, as in every engine"


def test_what_agrees_is_merged_and_what_is_unknown_is_passed_on(tmp_path: Path) -> None:
    tree = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.98], "torch_adam": True}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "offload_param": {"device": "cpu"}},
        "communication_data_type": "bf16",
        "a_key_of_tomorrow": {"depth": [1]},
    }
    found = merged(tmp_path, tree, {"lr": 1e-3, "clip_norm": 1.0})
    zero = found["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["offload_param"]) == (3, 1000, {"device": "cpu"})
    assert found["communication_data_type"] == "bf16"
    assert found["a_key_of_tomorrow"] == {"depth": [1]}
    assert "optimizer" not in found
    assert found["train_micro_batch_size_per_gpu"] == 1


def test_offload_reaches_what_a_stage_spreads(tmp_path: Path) -> None:
    zero = {stage: merged(tmp_path, {}, {}, offload=True, zero_stage=stage)["zero_optimization"] for stage in (1, 3)}
    assert zero[1]["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in zero[1]
    assert zero[3]["offload_optimizer"] == zero[3]["offload_param"] == {"device": "cpu"}


CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"gradient_clipping": 2.0}, {"clip_norm": 1.0}, {}, "gradient_clipping 2.0 contradicts optim.clip_norm 1.0"),
    ({"gradient_clipping": 2.0}, {}, {}, "gradient_clipping 2.0 contradicts optim.clip_norm None"),
    ({"optimizer": {"type": "Lamb"}}, {}, {}, "optimizer.type 'Lamb' contradicts optim.name 'adamw'"),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
        {"lr": 1e-3},
        {},
        "optimizer.params.lr 0.0003 contradicts optim.lr 0.001",
    ),
    (
        {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
        {},
        {},
        "optimizer.params.betas [0.9, 0.999] contradicts optim.betas (0.9, 0.98)",
    ),
    (
        {"optimizer": {"params": {"weight_decay": 0.1}}},
        {},
        {},
        "optimizer.params.weight_decay 0.1 contradicts optim.weight_decay 0.2",
    ),
    ({"optimizer": {"params": {"freeze_step": 9}}}, {}, {}, "optimizer 'freeze_step' has no knob here"),
    ({"scheduler": {"type": "WarmupLR"}}, {}, {}, "scheduler.type 'WarmupLR' contradicts optim.schedule 'cosine"),
    ({"bf16": {"enabled": True}}, {}, {}, "bf16.enabled True contradicts model.precision 'fp32'"),
    ({"fp16": {"enabled": True}}, {}, {}, "fp16.enabled True contradicts model.precision 'fp32'"),
    (
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        {},
        {},
        "torch_autocast.dtype 'float16' contradicts model.precision 'fp32'",
    ),
    (
        {"zero_optimization": {"stage": 3}},
        {},
        {"zero_stage": 2},
        "zero_optimization.stage 3 contradicts parallel.zero_stage 2",
    ),
    (
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
        {},
        {"zero_stage": 2},
        "zero_optimization.offload_param.device 'cpu' contradicts parallel.zero_stage '2 (it needs 3 or more)'",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
        {},
        {"offload": True},
        "zero_optimization.offload_optimizer.device 'none' contradicts parallel.offload True",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        {},
        {},
        "zero_optimization.offload_optimizer.device 'nvme' keeps tensors in files of its own",
    ),
    (
        {"zero_optimization": {"compute_grad_norm": False}},
        {"clip_norm": 1.0},
        {},
        "compute_grad_norm False contradicts",
    ),
    ({"managed_gradient_accumulation": False}, {}, {}, "managed_gradient_accumulation False contradicts"),
    ({"zero_optimization": {"stage": 5}}, {}, {}, "DeepSpeed has stages 0, 1, 2 and 3"),
    ({}, {}, {"zero_stage": 0, "offload": True}, "nothing can be offloaded at parallel.zero_stage 0"),
    ({}, {"name": "muon"}, {}, "optim.name muon: it looks at whole tensors, which ZeRO stage 2 cuts into pieces"),
]


@pytest.mark.parametrize(("tree", "optim", "parallel", "said"), CONTRADICTIONS, ids=lambda item: str(item)[:60])
def test_contradictions_are_refused_with_both_values(
    tree: dict[str, Any], optim: dict[str, Any], parallel: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        merged(tmp_path, tree, optim, **parallel)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"train_batch_size": 64}, "train_batch_size 64 contradicts train.global_batch 32"),
        ({"train_micro_batch_size_per_gpu": 16}, "train_micro_batch_size_per_gpu 16 contradicts train.micro_batch 8"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4 contradicts train.global_batch / ranks"),
        ({"elasticity": {"enabled": True}}, "elasticity.enabled True contradicts a train.global_batch that is fixed"),
    ],
    ids=str,
)
def test_batch_sizes_must_be_ours(tree: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    words = ["--engine", "deepspeed", "--parallel.deepspeed", str(path), "--train.micro-batch", "8"]
    run = runfile.load(Path(__file__).resolve().parents[2] / "configs" / "debug.yaml", words)
    path.write_text(json.dumps({"train_batch_size": 32, "gradient_accumulation_steps": 2}))
    check_world(run, 2)
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=re.escape(said)):
        check_world(run, 2)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not JSON"), ("[]", "an object, not a list"), ('{"a": 1, "a": 2}', "a is written twice")]
)
def test_a_file_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        deepspeed_config.merge(config.Parallel(deepspeed=str(path)), config.Optim(), "fp32")
    with pytest.raises(UserError, match="cannot be read"):
        deepspeed_config.merge(config.Parallel(deepspeed=str(tmp_path / "none.json")), config.Optim(), "fp32")


@pytest.mark.parametrize("flag", [["--parallel.zero-stage", "1"], ["--parallel.deepspeed", "x.json"]], ids=str)
def test_another_engine_refuses_the_knobs(flag: list[str]) -> None:
    with pytest.raises(UserError, match="means nothing to engine ddp: it is for deepspeed"):
        runfile.load(None, ["--engine", "ddp", "--data.train", "synthetic:1024", "--train.samples", "2048", *flag])
