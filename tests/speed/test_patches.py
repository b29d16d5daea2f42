"""Patch dropout: in training alone, replayed by the cached-feature step, no part of what a checkpoint describes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain import config, engines, exchange, objectives, step
from pretrain.errors import UserError
from pretrain.model import DualEncoder, build
from pretrain.towers.architecture import SHIPPED
from pretrain.values import Batch, Features, Pairs
from pretrain.world import World

CPU = torch.device("cpu")
CLIP = objectives.find("clip")(objectives.find("clip").Options())


def encoder(share: float, name: str = "debug-tiny") -> DualEncoder:
    return build(config.Model(name=name, patch_dropout=share), [CLIP], 0, CPU).double().train()


def images(rows: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_training_sees_some_patches_and_evaluation_all() -> None:
    dropped, plain, seen = encoder(0.5), encoder(0.0), []
    dropped.towers.visual.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert not torch.equal(dropped.encode_image(images(2)), plain.encode_image(images(2)))
    assert torch.equal(dropped.eval().encode_image(images(2)), plain.eval().encode_image(images(2)))
    assert seen == [1 + 8, 1 + 16], "the class token, and half of 16 patches"
    assert dropped.facts() == plain.facts(), "an export would drop patches elsewhere"


def test_the_cached_step_drops_the_same_patches_twice() -> None:
    model, columns = encoder(0.5), exchange.make("local", 0, 1)
    texts = torch.randint(1, 400, (12, 16), generator=torch.Generator().manual_seed(1))
    batch = Batch(images(12), texts, torch.arange(12), tuple(map(str, range(12))))
    torch.manual_seed(5)
    parts = [model(part.images, part.texts) for part in batch.split(4)]
    rows = {key: torch.cat([part.rows()[key] for part in parts]) for key in ("image", "text")}
    whole = Features.of(parts[0].tensors() | rows)
    step.total(step.loss_terms([CLIP], Pairs(whole, columns, batch.ids))).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(5)
    engine = engines.find("single", 1)(model, config.Optim(), World(0, 1, 0, CPU))
    step.cached_step(engine, [CLIP], columns, batch, 4)
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-11)


def test_a_tower_without_patches_is_refused(tmp_path: Path) -> None:
    tiny = json.loads((SHIPPED / "debug-tiny.json").read_text())
    path = tmp_path / "no-patches.json"
    vision = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32}
    path.write_text(json.dumps(tiny | {"vision_cfg": vision}))
    with pytest.raises(UserError, match=r"model.patch_dropout 0.5: the image tower .ModifiedResNet.* has no patches"):
        encoder(0.5, str(path))
    timm = {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "timm_pool": "", "image_size": 64}
    path = tmp_path / "convolutions.json"
    path.write_text(json.dumps(tiny | {"vision_cfg": timm | {"timm_proj": "linear"}}))
    with pytest.raises(UserError, match=r"model.patch_dropout 0.5: the image tower .convnext_atto.* has no patches"):
        encoder(0.5, str(path))
