"""Gradient checkpointing is honoured by every kind of tower, or refused: counted, not believed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain import config, model
from pretrain.errors import UserError
from pretrain.towers import architecture

CPU = torch.device("cpu")
TINY = json.loads((architecture.SHIPPED / "debug-tiny.json").read_text())
RESNET = TINY | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32}}


def timm(name: str) -> dict[str, Any]:
    return TINY | {"vision_cfg": {"timm_model_name": name, "timm_pool": "avg"}, "custom_text": True}


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


def build(path: Path, towers: dict[str, Any], **knobs: Any) -> model.DualEncoder:
    path.write_text(json.dumps(towers))
    return model.build(config.Model(name=str(path), **knobs), Clip(), 0, CPU).train()


def run(encoder: model.DualEncoder, blocks: list[nn.Module]) -> tuple[Counter[int], dict[str, torch.Tensor]]:
    """Forward calls of each block in one forward and backward, and the gradients."""
    calls: Counter[int] = Counter()
    for number, block in enumerate(blocks):
        # A module that is computed again under torch.utils.checkpoint runs its hooks again.
        block.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *encoder.image_spec.size), dtype=torch.uint8, generator=generator)
    features = encoder(images, torch.randint(2, 150, (2, 16), generator=generator))
    logits = features.logit_scale * features.image @ features.text.T
    nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    return calls, {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def check(path: Path, towers: dict[str, Any], blocks: Any) -> None:
    """Each block runs once without, twice with recomputation, and gradients agree."""
    plain, again = build(path, towers), build(path, towers, grad_checkpointing=True)
    calls, gradients = run(plain, blocks(plain.towers))
    calls_again, gradients_again = run(again, blocks(again.towers))
    assert set(calls.values()) == {1}
    assert set(calls_again.values()) == {2}
    assert calls.keys() == calls_again.keys()
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("custom_text", [False, True])
def test_native_towers(tmp_path: Path, custom_text: bool) -> None:
    def blocks(towers: Any) -> list[nn.Module]:
        text = towers.text if custom_text else towers
        return [*towers.visual.transformer.resblocks, *text.transformer.resblocks]

    check(tmp_path / f"recompute-{custom_text}.json", TINY | {"custom_text": custom_text}, blocks)


def test_timm_towers(tmp_path: Path) -> None:
    check(
        tmp_path / "recompute-timm.json", timm("vit_tiny_patch16_224"), lambda towers: list(towers.visual.trunk.blocks)
    )


def test_hugging_face_towers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformers.RobertaConfig(vocab_size=200, max_position_embeddings=40, **shape, **plain).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    text |= {"hf_proj_type": "linear", "context_length": 16}
    # Counted inside the layer: its own call is replaced while transformers recomputes it.
    check(
        tmp_path / "recompute-roberta.json",
        TINY | {"text_cfg": text},
        lambda towers: [layer.attention for layer in towers.text.transformer.encoder.layer],
    )


@pytest.mark.parametrize(
    ("towers", "says"),
    [
        (RESNET, "ModifiedResNet.*batch norms"),
        (timm("resnet18"), "ResNet.*batch norms"),
        (timm("selecsls42"), "SelecSls"),
    ],
)
def test_towers_that_cannot_are_refused(tmp_path: Path, towers: dict[str, Any], says: str) -> None:
    name = towers["vision_cfg"].get("timm_model_name", "native")
    with pytest.raises(UserError, match=f"the image tower .{says}") as caught:
        build(tmp_path / f"refused-{name}.json", towers, grad_checkpointing=True)
    assert "\n" not in str(caught.value)


def test_a_locked_tower_that_ignores_it_is_refused_too(tmp_path: Path) -> None:
    """open_clip's ResNet takes the call and does nothing."""
    with pytest.raises(UserError, match=r"ModifiedResNet.*does not support it"):
        build(tmp_path / "refused-locked.json", RESNET, grad_checkpointing=True, lock_image=0)
