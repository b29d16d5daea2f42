"""Building the dual encoder: names, seeds, precision, features."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pretrain import config, model
from pretrain.compat import open_clip
from pretrain.data.images.transforms import normalize
from pretrain.data.texts import tokenizer
from pretrain.errors import UserError
from pretrain.towers import architecture

CPU = torch.device("cpu")
TINY = json.loads((architecture.SHIPPED / "debug-tiny.json").read_text())


@dataclass(frozen=True)
class Wanted:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


CLIP, SIGLIP = Wanted(), Wanted(10.0, -10.0, math.inf)


def build(seed: int = 0, objective: Wanted = CLIP, **knobs: object) -> model.DualEncoder:
    return model.build(config.Model(**{"name": "debug-tiny"} | knobs), objective, seed, CPU)  # type: ignore[arg-type]


def pairs(count: int = 4, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    texts = torch.randint(1, 49000, (count, 16))
    texts[:, -1] = 49407
    return images, texts


def written(path: Path, **changes: object) -> str:
    path.write_text(json.dumps(TINY | changes))
    return str(path)


def test_features_equal_open_clips_own() -> None:
    encoder, (images, texts) = build().eval(), pairs()
    features = encoder(images, texts)
    image, text, scale = encoder.towers(normalize(images, encoder.image_spec), texts)
    assert torch.equal(features.image, image)
    assert torch.equal(features.text, text)
    assert torch.equal(features.logit_scale, scale)
    assert features.logit_bias is None
    assert features.logit_scale.shape == ()
    assert build(objective=SIGLIP)(images, texts).logit_bias.shape == ()


def test_state_names_are_open_clips(tmp_path: Path) -> None:
    theirs = open_clip.create_model(build().architecture.name)
    assert build().towers.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_unit_norm_fp32(precision: str) -> None:
    features = build(precision=precision)(*pairs())
    for rows in (features.image, features.text):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


def test_bf16_towers_really_compute_in_bf16() -> None:
    (images, texts), full = pairs(), build()
    half = build(precision="bf16")
    difference = (half.encode_image(images) - full.encode_image(images)).abs().max()
    assert 1e-4 < difference < 3e-2
    seen = []
    half.towers.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(
        lambda _, __, out: seen.append(out.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = half(images, texts)
    assert seen == [torch.bfloat16]
    assert features.image.dtype == torch.float32
    assert half.towers.logit_scale.dtype == torch.float32


def test_double_weights_give_double_features() -> None:
    features = build().double()(*pairs())
    assert features.image.dtype == features.text.dtype == torch.float64


def test_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build(seed=3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = build(seed=3).state_dict(), build(seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["towers.visual.proj"], other["towers.visual.proj"])


@pytest.mark.parametrize("custom_text", [False, True])
def test_every_parameter_belongs_to_its_tower(tmp_path: Path, custom_text: bool) -> None:
    name = written(tmp_path / f"tower-of-{custom_text}.json", custom_text=custom_text)
    encoder = build(name=name, objective=SIGLIP)
    found: dict[str, set[str]] = {"image": set(), "text": set(), "head": set()}
    for parameter, _ in encoder.named_parameters():
        found[encoder.tower_of(parameter)].add(parameter.removeprefix("towers."))
        assert encoder.tower_of(parameter.removeprefix("towers.")) == encoder.tower_of(parameter)
    image, text = found["image"], found["text"]
    assert found["head"] == {"logit_scale", "logit_bias"}
    assert image == {f"visual.{name}" for name, _ in encoder.towers.visual.named_parameters()}
    assert len(text) == len(dict(encoder.towers.named_parameters())) - len(image) - 2
    assert all(name.startswith("text.") for name in text) == custom_text


def test_a_model_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert architecture.find(config.Model(name="ViT-B-32")).preprocess["size"] == (224, 224)
    found = build(name=written(tmp_path / "half-size.json", embed_dim=16))
    assert found.encode_image(pairs()[0]).shape == (4, 16)
    assert found.architecture.name == "half-size"
    assert tokenizer.build(found.architecture.name)(["a cat"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ViT-B-23", "nearest: ViT-B-32"),
        ("ViT-B/32", "nearest: ViT-B-32"),
        ("debug_tiny", "nearest: debug-tiny"),
        ("missing.json", "there is no such file"),
        ("hf-hub:somebody/model", "model.pretrained"),
        ("coca_ViT-B-32", "captioning decoder"),
    ],
)
def test_a_wrong_name_is_told(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        build(name=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("ViT-B-32.json", json.dumps(TINY), "rename the file"),
        ("my-siglip.json", json.dumps(TINY), "hf_tokenizer_name"),
        ("broken.json", "{", "JSON"),
        ("part.json", json.dumps({"embed_dim": 4}), "vision_cfg, text_cfg"),
        ("odd.json", json.dumps(TINY | {"vision_cfg": {"no_such_knob": 1}}), "no_such_knob"),
    ],
)
def test_a_wrong_json_is_told(tmp_path: Path, file: str, content: str, says: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        build(name=str(tmp_path / file))
    assert "\n" not in str(caught.value)


def test_quick_gelu_changes_the_activation() -> None:
    images, texts = pairs()
    plain, quick = build()(images, texts), build(quick_gelu=True)(images, texts)
    assert not torch.equal(plain.image, quick.image)
    assert not torch.equal(plain.text, quick.text)
    assert build(quick_gelu=True).architecture.towers["quick_gelu"] is True


def test_the_learned_scale_stays_under_its_ceiling() -> None:
    encoder = build()
    assert encoder.max_logit_scale == pytest.approx(100)
    with torch.no_grad():
        encoder.towers.logit_scale.fill_(7.0)
    encoder.clamp()
    assert encoder.towers.logit_scale.exp().item() == pytest.approx(100, rel=1e-6)
    free = build(objective=SIGLIP)
    with torch.no_grad():
        free.towers.logit_scale.fill_(7.0)
    free.clamp()
    assert free.towers.logit_scale.item() == 7.0


@pytest.mark.parametrize("name", sorted(path.stem for path in architecture.SHIPPED.glob("*.json")))
def test_shipped_models_run(name: str) -> None:
    encoder = build(name=name)
    tokens = tokenizer.build(name)(["a photo of the digit seven.", ""])
    features = encoder(pairs(2)[0], tokens)
    assert features.image.shape == features.text.shape == (2, encoder.architecture.towers["embed_dim"])
