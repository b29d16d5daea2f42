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
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import config, model
from pretrain.errors import UserError
from pretrain.towers import architecture, recompute

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


def check(path: Path, towers: dict[str, Any], insides: Any, how: str = "all", every: int = 1) -> None:
    """Each block runs once without, those that are chosen twice with recomputation, and gradients agree.

    Args:
        insides: gives a module inside of each block: the block's own call, and its hooks, are not repeated.
    """
    plain, again = build(path, towers), build(path, towers, grad_checkpointing=how)
    calls, gradients = run(plain, insides(plain.towers))
    calls_again, gradients_again = run(again, insides(again.towers))
    assert set(calls.values()) == {1}
    assert calls_again == {number: 1 + (number % every == 0) for number in calls}
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-6)


def native(towers: Any) -> list[nn.Module]:
    text = getattr(towers, "text", towers)
    return [block.mlp for tower in (towers.visual, text) for block in tower.transformer.resblocks]


@pytest.mark.parametrize("custom_text", [False, True])
def test_native_towers(tmp_path: Path, custom_text: bool) -> None:
    check(tmp_path / f"recompute-{custom_text}.json", TINY | {"custom_text": custom_text}, native)


def test_every_second_block(tmp_path: Path) -> None:
    layers = {"vision_cfg": TINY["vision_cfg"] | {"layers": 4}, "text_cfg": TINY["text_cfg"] | {"layers": 4}}
    check(tmp_path / "recompute-every.json", TINY | layers, native, how="every=2", every=2)


class Products(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[operator] += 1
        return operator(*args, **(kwargs or {}))


def test_selective_repeats_only_what_is_cheap(tmp_path: Path) -> None:
    """Matrix products are as many as without; layer norms are computed again; gradients agree."""
    path, seen = tmp_path / "recompute-selective.json", {}
    for how in ("off", "selective", "all"):
        with Products() as products:
            _, gradients = run(build(path, TINY, grad_checkpointing=how), [])
        products.seen["dear"] = sum(count for operator, count in products.seen.items() if operator in recompute.DEAR)
        seen[how] = products.seen, gradients
    norms = torch.ops.aten.native_layer_norm.default
    assert seen["selective"][0]["dear"] == seen["off"][0]["dear"] < seen["all"][0]["dear"]
    assert seen["selective"][0][norms] == seen["all"][0][norms] > seen["off"][0][norms]
    for name, gradient in seen["off"][1].items():
        torch.testing.assert_close(seen["selective"][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_timm_towers(tmp_path: Path) -> None:
    check(
        tmp_path / "recompute-timm.json",
        timm("vit_tiny_patch16_224"),
        lambda towers: [block.mlp for block in towers.visual.trunk.blocks],
    )


def test_hugging_face_towers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformers.RobertaConfig(vocab_size=200, max_position_embeddings=40, **shape, **plain).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    text |= {"hf_proj_type": "linear", "context_length": 16}
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
        build(tmp_path / f"refused-{name}.json", towers, grad_checkpointing="all")
    assert "\n" not in str(caught.value)


def test_a_tower_without_blocks_is_refused(tmp_path: Path) -> None:
    """Its batch norms are locked; but each of its stages has one block only."""
    with pytest.raises(UserError, match=r"ModifiedResNet.*has no repeated blocks"):
        build(tmp_path / "refused-locked.json", RESNET, grad_checkpointing="all", lock_image=True)
