"""Blocks are found in every kind of tower that open_clip builds: never nothing of a tower, and each parameter once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain import config
from pretrain.model import build
from pretrain.towers import blocks
from pretrain.towers.architecture import SHIPPED

TINY = json.loads((SHIPPED / "debug-tiny.json").read_text())
TEXT = TINY["text_cfg"]
HF_SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


class Wanted:
    init_logit_scale = 10.0
    init_logit_bias = None
    max_logit_scale = 100.0


def timm(name: str, **more: Any) -> dict[str, Any]:
    return TINY | {"vision_cfg": {"timm_model_name": name, "image_size": 224, **more}, "custom_text": True}


def hugging_face(folder: Path) -> dict[str, Any]:
    """A RoBERTa of random weights whose vocabulary outweighs a block, as those of real ones do."""
    transformers = pytest.importorskip("transformers")
    transformers.RobertaConfig(vocab_size=4000, max_position_embeddings=40, **HF_SHAPE).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_proj_type": "linear", "context_length": 16}
    return TINY | {"text_cfg": text | {"hf_pooler_type": "mean_pooler"}}


def units_of(tmp_path: Path, towers: dict[str, Any], name: str) -> dict[str, blocks.Units]:
    path = tmp_path / f"units-{name}.json"
    path.write_text(json.dumps(towers))
    model = build(config.Model(name=str(path)), Wanted(), 0, torch.device("meta"))
    assert all(parameter.is_meta for parameter in model.towers.parameters())
    found = {unit.tower: unit for unit in blocks.units(model.towers)}
    held = Counter(id(p) for unit in found.values() for block in unit.blocks for p in block.parameters())
    assert set(held.values()) <= {1}, "no block lies in another"
    assert id(model.towers.logit_scale) not in held
    return found


@pytest.mark.parametrize(
    ("name", "vision", "kind", "count", "least"),
    [
        ("vit", {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12}, "ResidualAttentionBlock", 12, 0.95),
        ("resnet", {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64}, "Bottleneck", 16, 0.6),
        ("timm-vit", timm("vit_tiny_patch16_224", timm_pool="token"), "Block", 12, 0.95),
        ("timm-convnext", timm("convnext_tiny"), "ConvNeXtBlock", 18, 0.9),
        ("timm-resnet", timm("resnet26"), "Bottleneck", 8, 0.9),
        ("timm-swin", timm("swin_tiny_patch4_window7_224"), "SwinTransformerBlock", 12, 0.9),
        ("timm-eva", timm("eva02_tiny_patch14_224"), "EvaBlock", 12, 0.9),
    ],
)
def test_image_towers(tmp_path: Path, name: str, vision: dict[str, Any], kind: str, count: int, least: float) -> None:
    towers = vision if "vision_cfg" in vision else TINY | {"vision_cfg": vision}
    unit = units_of(tmp_path, towers, name)["image"]
    assert {type(block).__name__ for block in unit.blocks} == {kind}
    assert len(unit.blocks) == count
    assert unit.share >= least
    assert f"{count} {kind}" in str(unit)


def test_text_towers(tmp_path: Path) -> None:
    large = TINY | {"text_cfg": TEXT | {"width": 256, "heads": 4, "layers": 6}}
    for name, towers in {"open": large, "custom": large | {"custom_text": True}}.items():
        unit = units_of(tmp_path, towers, name)["text"]
        assert Counter(type(block).__name__ for block in unit.blocks) == {"ResidualAttentionBlock": 6, "Embedding": 1}
        assert unit.share > 0.99
    unit = units_of(tmp_path, hugging_face(tmp_path / "roberta"), "hf")["text"]
    assert Counter(type(block).__name__ for block in unit.blocks) == {"RobertaLayer": 3, "Embedding": 1}
    assert unit.share > 0.95


def test_a_tower_without_repeated_blocks_is_one_unit(tmp_path: Path) -> None:
    one = {"vision_cfg": TINY["vision_cfg"] | {"layers": 1}, "text_cfg": TEXT | {"layers": 1}}
    for custom in (False, True):
        for tower, unit in units_of(tmp_path, TINY | one | {"custom_text": custom}, f"one-{custom}").items():
            assert not unit.blocks
            assert [type(rest) for rest in unit.whole], tower
            assert unit.share > 0


def test_single_layers_and_lone_blocks_are_none() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert blocks.blocks(layers) == []
    stages = nn.Sequential(nn.Sequential(layers, nn.GELU()), nn.Sequential(layers, nn.GELU()))
    assert blocks.blocks(stages) == list(stages), "a stage without blocks, beside another, is one"
