"""Which parameters share a rate and a decay: towers, layers, patterns, matrices; for every kind of tower."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain import config, model, optim
from pretrain.config import Optim
from pretrain.errors import UserError
from pretrain.objectives import find
from pretrain.optim import groups
from pretrain.towers import architecture

TINY = json.loads((architecture.SHIPPED / "debug-tiny.json").read_text())
RESNET = TINY | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32}}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model JSON of a timm image tower and a small Hugging Face text tower that needs no network."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("roberta")
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.RobertaConfig(vocab_size=200, max_position_embeddings=40, **shape).save_pretrained(folder)
    text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_proj_type": "mlp", "context_length": 16}
    return TINY | {"vision_cfg": TIMM, "text_cfg": text | {"hf_pooler_type": "mean_pooler"}}


def build(path: Path, description: dict[str, Any]) -> Any:
    """open_clip's model."""
    path.write_text(json.dumps(description))
    objective = find("clip")
    return model.build(config.Model(name=str(path)), objective(None), 0, torch.device("cpu")).towers


def split(towers: nn.Module, **knobs: Any) -> dict[str, groups.Group]:
    """A parameter's group, by its name."""
    return {name: group for group in groups.split(towers, Optim(**knobs)) for name in group.params}


def scale(found: dict[str, groups.Group], *names: str) -> list[float]:
    return [found[name].lr_scale for name in names]


def test_towers_have_rates_of_their_own(tmp_path: Path) -> None:
    towers = build(tmp_path / "rates.json", TINY)
    found = split(towers, image_lr=0.5, text_lr=2.0)
    assert len(found) == len(list(towers.named_parameters()))
    assert {name: group.lr_scale for name, group in found.items()} == {
        name: 1.0 if name == "logit_scale" else 0.5 if name.startswith("visual.") else 2.0 for name in found
    }
    optimizer = optim.build(towers, Optim(lr=1e-3, image_lr=0.5, text_lr=2.0))
    optim.set_rate(optimizer, 1e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(towers.visual.proj)] == 0.5 * 1e-4
    assert rates[id(towers.text_projection)] == 2.0 * 1e-4
    assert rates[id(towers.logit_scale)] == 1e-4


def test_layers_of_a_native_model(tmp_path: Path) -> None:
    """Embeddings, two layers, the projection: each one step of the decay below the next."""
    towers = build(tmp_path / "native.json", TINY)
    found = split(towers, layer_decay=0.5, image_lr=2.0)
    image = ("conv1.weight", "class_embedding", "ln_pre.weight", "transformer.resblocks.0.attn.in_proj_weight")
    image = (*image, "transformer.resblocks.1.mlp.c_fc.bias", "ln_post.bias", "proj")
    assert scale(found, *(f"visual.{name}" for name in image)) == [0.25, 0.25, 0.25, 0.5, 1.0, 1.0, 2.0]
    text = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.ln_1.weight")
    text = (*text, "transformer.resblocks.1.ln_2.weight", "ln_final.weight", "text_projection", "logit_scale")
    assert scale(found, *text) == [0.125, 0.125, 0.25, 0.5, 0.5, 1.0, 1.0]


def test_layers_of_timm_and_hugging_face(tmp_path: Path, foreign: dict[str, Any]) -> None:
    """The projection behind a trunk has the whole rate; the trunk's layers follow."""
    found = split(build(tmp_path / "foreign.json", foreign), layer_decay=0.5)
    top = [name for name in found if name.startswith(("visual.head.", "text.proj."))]
    assert top
    assert scale(found, *top) == [1.0] * len(top)
    last = scale(found, "visual.trunk.norm.weight", "visual.trunk.blocks.11.attn.qkv.weight")
    assert last == [0.5, 0.5]
    blocks = scale(found, *(f"visual.trunk.blocks.{n}.mlp.fc1.weight" for n in range(12)))
    assert all(below == above / 2 for below, above in itertools.pairwise(blocks))
    assert scale(found, "visual.trunk.patch_embed.proj.weight", "visual.trunk.pos_embed") == [blocks[0] / 2] * 2
    layers = scale(found, *(f"text.transformer.encoder.layer.{n}.output.dense.weight" for n in range(3)))
    assert layers == [0.125, 0.25, 0.5]
    assert scale(found, "text.transformer.embeddings.word_embeddings.weight") == [0.0625]


def test_layers_of_a_resnet(tmp_path: Path) -> None:
    towers = build(tmp_path / "resnet.json", RESNET)
    found = split(towers, layer_decay=0.5)
    names = ("conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "attnpool.q_proj.weight")
    assert scale(found, *(f"visual.{name}" for name in names)) == [2**-5, 2**-4, 0.5, 1.0]


def test_a_tower_without_layers_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual, self.text = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(UserError, match=r"optim.layer_decay 0.9: the image tower does not tell its layers"):
        optim.build(Odd(), Optim(layer_decay=0.9))


def test_patterns_spare_parameters_from_decay(tmp_path: Path) -> None:
    towers = build(tmp_path / "patterns.json", TINY)
    plain, found = split(towers), split(towers, no_decay=("token_embedding.*", "visual.proj"))
    changed = {name for name in found if found[name].weight_decay != plain[name].weight_decay}
    assert changed == {"token_embedding.weight", "visual.proj"}
    assert all(found[name].weight_decay == 0 for name in changed)
    with pytest.raises(UserError, match=r"optim.no_decay 'tokens.\*' fits no parameter; they are named like"):
        optim.build(towers, Optim(no_decay=("visual.*", "tokens.*")))


def test_matrices_for_muon(tmp_path: Path, foreign: dict[str, Any]) -> None:
    """Inside layers only: no embeddings, tables of positions, projections, convolutions, heads."""
    native = split(build(tmp_path / "muon.json", TINY), name="muon")
    parts = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    layers = [f"{tower}transformer.resblocks.{n}." for tower in ("visual.", "") for n in range(2)]
    assert {name for name, group in native.items() if group.hidden} == {a + b for a in layers for b in parts}

    others = split(build(tmp_path / "foreign-muon.json", foreign), name="muon")
    hidden = {name for name, group in others.items() if group.hidden}
    assert {"visual.trunk.blocks.3.attn.qkv.weight", "text.transformer.encoder.layer.2.output.dense.weight"} <= hidden
    assert "text.proj.0.weight" in others
    for name in ("text.proj.", "visual.head.", "text.transformer.embeddings.", "visual.trunk.pos_embed"):
        assert not any(found.startswith(name) for found in hidden)
    assert all(others[name].weight_decay > 0 for name in hidden)


def test_locked_towers_leave_muon_nothing(tmp_path: Path) -> None:
    towers = build(tmp_path / "locked.json", TINY)
    for name, param in towers.named_parameters():
        param.requires_grad_("transformer" not in name)
    with pytest.raises(UserError, match=r"optim\.name muon: the towers train no matrices inside layers"):
        optim.build(towers, Optim(name="muon"))


def test_what_was_found_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    towers = build(tmp_path / "told.json", TINY)
    caplog.set_level(logging.INFO, "pretrain")
    optim.build(towers, Optim())
    assert not caplog.messages, "the default says nothing"
    optim.build(towers, Optim(name="muon", layer_decay=0.5))
    total = sum(param.numel() for param in towers.parameters())
    matrices = 4 * (3 + 1 + 4 + 4) * 32 * 32
    assert caplog.messages == [
        "optim: image tower at 0.125 to 1 of the rate (4 values)",
        "optim: text tower at 0.125 to 1 of the rate (4 values)",
        "optim: scale and bias at 1 to 1 of the rate (1 values)",
        f"optim: Muon for {matrices:,} weights in matrices, AdamW for the other {total - matrices:,}",
    ]


def test_the_default_has_two_groups_in_the_models_order(tmp_path: Path) -> None:
    """As before there was more to choose: the order is part of a run's bits."""
    towers = build(tmp_path / "default.json", TINY)
    spared = optim.undecayed(towers)
    expected = [[p for n, p in towers.named_parameters() if (n in spared) == first] for first in (True, False)]
    optimizer = optim.build(towers, Optim())
    assert type(optimizer) is torch.optim.AdamW
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(p) for p in g] for g in expected]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
