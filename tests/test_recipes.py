"""The shipped recipes start: their real towers take a batch on the meta device, and their settings train a tiny one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain import objectives, runfile
from pretrain.config import Model
from pretrain.model import build
from pretrain.signals import StopRequest
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem.startswith(("clip_", "siglip_")))


def test_the_recipes_that_the_readme_promises_are_there() -> None:
    names = " ".join(path.stem for path in RECIPES)
    assert all(part in names for part in ("clip_vit_b32", "clip_vit_b16", "clip_vit_l14", "siglip_vit_b16"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_real_towers_take_a_batch_on_the_meta_device(recipe: Path) -> None:
    run = runfile.load(recipe, [])
    chosen = [objectives.find(choice.name)(choice.options) for choice in run.objective]
    meta = torch.device("meta")
    with meta:
        model = build(replace(run.model, precision="fp32"), chosen, run.seed, meta).train()  # meta has no autocast
    images = torch.empty(2, 3, *model.image_spec.size, dtype=torch.uint8, device=meta)
    texts = torch.empty(2, model.towers.context_length, dtype=torch.int64, device=meta)
    features = model(images, texts)
    assert features.image.shape == features.text.shape
    assert features.image.shape[0] == 2
    assert (features.logit_bias is not None) == (run.objective[0].name == "siglip")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_settings_train_a_tiny_model(recipe: Path, tmp_path: Path) -> None:
    run = runfile.load(recipe, ["--folder", str(tmp_path), "--data.train", "synthetic:1024", "--data.workers", "0"])
    micro = None if run.train.micro_batch is None else 4
    tiny = Model(name="debug-tiny", precision=run.model.precision, grad_checkpointing=run.model.grad_checkpointing)
    size = replace(run.train, samples=16, epochs=None, global_batch=8, micro_batch=micro)
    warmup = replace(run.optim, warmup_samples=8)
    with StopRequest() as stop:
        train(replace(run, model=tiny, train=size, optim=warmup, log=replace(run.log, every_steps=1)), stop)
    lines = [json.loads(line) for line in (tmp_path / run.name / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [8, 16]
    assert lines[0]["lr"] == run.optim.lr
    assert all(0 < line["loss"] < 100 for line in lines)
