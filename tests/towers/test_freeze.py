"""Locked towers: what moves, what does not, for every kind of tower."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain import config, model
from pretrain.errors import UserError
from pretrain.towers import architecture, freeze

CPU = torch.device("cpu")
TINY = json.loads((architecture.SHIPPED / "debug-tiny.json").read_text())
RESNET = TINY | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32}}
TIMM = TINY | {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}, "custom_text": True}
CUSTOM = TINY | {"custom_text": True}


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model JSON with a small Hugging Face text tower that needs no network."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("roberta")
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.RobertaConfig(vocab_size=200, max_position_embeddings=40, **shape).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_proj_type": "linear", "context_length": 16}
    return TINY | {"text_cfg": text | {"hf_pooler_type": "mean_pooler"}}


def build(path: Path, towers: dict[str, Any], **knobs: Any) -> model.DualEncoder:
    path.write_text(json.dumps(towers))
    return model.build(config.Model(name=str(path), **knobs), Clip(), 0, CPU)


def trainable(encoder: model.DualEncoder) -> set[str]:
    return {name for name, parameter in encoder.towers.named_parameters() if parameter.requires_grad}


def step(encoder: model.DualEncoder) -> set[str]:
    """Names in the state_dict that one training step changed."""
    encoder.train()
    before = {name: tensor.clone() for name, tensor in encoder.towers.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 10.0)
    size = encoder.image_spec.size
    texts = torch.randint(2, 150, (4, 16))
    features = encoder(torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8), texts)
    logits = features.logit_scale * features.image @ features.text.T
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    optimizer.step()
    return {name for name, tensor in encoder.towers.state_dict().items() if not torch.equal(tensor, before[name])}


def norms(encoder: model.DualEncoder) -> set[str]:
    kinds = (nn.LayerNorm, nn.modules.batchnorm._NormBase)
    modules = [(path, m) for path, m in encoder.towers.named_modules() if isinstance(m, kinds)]
    return {f"{path}.{name}" for path, module in modules for name, _ in module.named_parameters()}


@pytest.mark.parametrize("towers", [TINY, CUSTOM], ids=["native", "custom-text"])
@pytest.mark.parametrize("frozen_norms", [True, False])
def test_d16_a_native_text_tower_locks_with_and_without_norms(
    tmp_path: Path, towers: dict[str, Any], frozen_norms: bool
) -> None:
    """open_clip ends with an assertion unless the norms are frozen too."""
    encoder = build(tmp_path / f"d16-{'custom_text' in towers}.json", towers, lock_text=0, lock_norms=frozen_norms)
    moved = step(encoder)
    text = {name for name in encoder.towers.state_dict() if encoder.tower_of(name) == "text"}
    expected = set() if frozen_norms else text & norms(encoder)
    assert moved & text == expected
    assert bool(expected) != frozen_norms
    assert "visual.proj" in moved


@pytest.mark.parametrize("unlocked", [0, 1, 2, 3, 4])
def test_native_groups_are_open_clips(tmp_path: Path, unlocked: int) -> None:
    knobs = {"lock_image": unlocked}
    knobs |= {"lock_text": unlocked}
    ours = build(tmp_path / "same-groups.json", TINY, **knobs)
    theirs = build(tmp_path / "same-groups.json", TINY)
    theirs.towers.lock_image_tower(unlocked)
    theirs.towers.lock_text_tower(unlocked)
    assert trainable(ours) == trainable(theirs)
    assert {"logit_scale"} <= trainable(ours)


def test_more_groups_than_there_are_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.lock_image 9 exceeds the 4 groups"):
        build(tmp_path / "too-many.json", TINY, lock_image=9)


def test_frozen_batch_norms_stand_still(tmp_path: Path) -> None:
    encoder = build(tmp_path / "resnet-still.json", RESNET, lock_image=0)
    assert not any(name.startswith("visual.") for name in step(encoder))
    assert encoder.training
    assert not encoder.towers.visual.bn1.training
    assert encoder.eval().train().towers.visual.bn1.training is False


def test_unfrozen_batch_norms_move_in_a_locked_resnet(tmp_path: Path) -> None:
    encoder = build(tmp_path / "resnet-moving.json", RESNET, lock_image=0, lock_norms=False)
    moved = {name for name in step(encoder) if name.startswith("visual.")}
    assert "visual.bn1.running_mean" in moved
    assert "visual.bn1.weight" in moved
    assert not [name for name in moved if "conv" in name or "attnpool" in name]


def test_resnet_groups(tmp_path: Path) -> None:
    encoder = build(tmp_path / "resnet-groups.json", RESNET, lock_image=2)
    moved = {name.split(".")[1] for name in step(encoder) if name.startswith("visual.")}
    assert moved == {"layer4", "attnpool"}


@pytest.mark.parametrize("unlocked", [0, 2])
def test_timm_towers_lock_but_for_their_projection(tmp_path: Path, unlocked: int) -> None:
    knobs = {"lock_image": unlocked}
    encoder = build(tmp_path / "timm-lock.json", TIMM, **knobs)
    image = {name for name in trainable(encoder) if name.startswith("visual.")}
    last = {name for name in image if name.startswith(("visual.trunk.blocks.10.", "visual.trunk.blocks.11."))}
    assert "visual.head.proj.weight" in image
    assert bool(last) == bool(unlocked)
    assert not [name for name in image if name.startswith(("visual.trunk.blocks.9.", "visual.trunk.patch_embed"))]


def test_timm_norms_stay_trainable_where_asked(tmp_path: Path) -> None:
    encoder = build(tmp_path / "timm-norms.json", TIMM, lock_image=0, lock_norms=False)
    image = {name for name in trainable(encoder) if name.startswith("visual.trunk.")}
    assert image == {name for name in norms(encoder) if name.startswith("visual.trunk.")}
    assert "visual.trunk.blocks.0.norm1.weight" in image


@pytest.mark.parametrize(("unlocked", "layers"), [(0, set()), (1, {"2"}), (2, {"1", "2"})])
def test_hugging_face_towers_lock_but_for_their_projection(
    tmp_path: Path, roberta: dict[str, Any], unlocked: int, layers: set[str]
) -> None:
    encoder = build(tmp_path / "roberta-lock.json", roberta, lock_text=unlocked)
    text = {name for name in step(encoder) if name.startswith("text.")}
    assert {name for name in text if ".layer." not in name} == {"text.proj.weight"}
    assert {name.split(".layer.")[1].split(".")[0] for name in text if ".layer." in name} == layers


def test_hugging_face_norms_stay_trainable_where_asked(tmp_path: Path, roberta: dict[str, Any]) -> None:
    encoder = build(tmp_path / "roberta-norms.json", roberta, lock_text=0, lock_norms=False)
    moved = {name for name in step(encoder) if name.startswith("text.transformer.")}
    assert moved
    assert all("LayerNorm" in name for name in moved)


def test_every_parameter_of_a_tower_is_in_one_group(tmp_path: Path, roberta: dict[str, Any]) -> None:
    for number, towers in enumerate((TINY, CUSTOM, RESNET, TIMM, roberta)):
        encoder = build(tmp_path / f"grouped-{number}.json", towers)
        for groups, tower in ((freeze.image_groups, "image"), (freeze.text_groups, "text")):
            names = [name for group in groups(encoder.towers) for name in group]
            own = {name for name, _ in encoder.towers.named_parameters() if encoder.tower_of(name) == tower}
            assert len(names) == len(set(names))
            assert own - set(names) <= {"visual.head.proj.weight", "text.proj.weight"}
            assert set(names) <= own
