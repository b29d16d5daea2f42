"""Starting from transformers' folders: the features of the model that was saved there, and what is refused."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain import config, model, objectives
from pretrain.compat import open_clip
from pretrain.errors import UserError

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
VOCABULARY, LENGTH, SIZE = 64, 16, 32
IDS = torch.tensor([[62, 5, 9, 63, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [62, *range(1, 15), 63]])


def saved_clip(folder: Path, act: str = "quick_gelu", **text: Any) -> Any:
    """A small CLIPModel with random weights, norms and biases among them, written to a folder."""
    shared: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    shared |= {"hidden_act": act}
    ends = {"bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 0}
    text = {"hidden_size": 32, "intermediate_size": 128, "vocab_size": VOCABULARY} | ends | shared | text
    vision = {"hidden_size": 48, "intermediate_size": 192, "image_size": SIZE, "patch_size": 8} | shared
    described = transformers.CLIPConfig(
        text_config={"max_position_embeddings": LENGTH} | text, vision_config=vision, projection_dim=24
    )
    return written(transformers.CLIPModel(described), folder)


def saved_siglip(folder: Path, act: str = "gelu") -> Any:
    """A small SiglipModel, of the shape of `small_siglip_trunk`."""
    shared: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "hidden_act": act}
    shared |= {"intermediate_size": 128}
    text = shared | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "projection_size": 32}
    text |= {"bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 0}
    described = transformers.SiglipConfig(
        text_config=text, vision_config=shared | {"image_size": SIZE, "patch_size": 8}
    )
    return written(transformers.SiglipModel(described), folder)


def written(saved: Any, folder: Path) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for param in saved.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))
        saved.logit_scale.fill_(3.0)
    saved.eval().save_pretrained(folder)
    return saved


def described(folder: Path, towers: dict[str, Any]) -> str:
    text = json.dumps(towers)
    path = folder / f"own-{zlib.crc32(text.encode())}.json"  # open_clip remembers every name
    path.write_text(text)
    return str(path)


def clip_model(folder: Path, **changes: Any) -> str:
    vision = {"image_size": SIZE, "layers": 2, "width": 48, "head_width": 24, "patch_size": 8}
    text = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
    return described(folder, {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text | changes})


def small_siglip_trunk(pretrained: bool = False, **options: Any) -> Any:
    """timm's vit_base_patch16_siglip_224, small: no class token, attention pooling, its own norms and GELU."""
    assert not pretrained
    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    kept = {key: options[key] for key in ("num_classes", "global_pool")}
    return timm.models.VisionTransformer(**shape, class_token=False, **kept)


timm.models.register_model(small_siglip_trunk)


def siglip_model(folder: Path, **changes: Any) -> str:
    """open_clip's SigLIP towers, small: the words of its ViT-B-16-SigLIP."""
    vision: dict[str, Any] = {
        "image_size": SIZE,
        "timm_model_name": "small_siglip_trunk",
        "timm_pool": "map",
        "timm_proj": "none",
    }
    text: dict[str, Any] = {"context_length": LENGTH, "vocab_size": VOCABULARY}
    text |= {"width": 32, "heads": 2, "layers": 2}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    text |= changes
    return described(folder, {"embed_dim": 32, "custom_text": True, "vision_cfg": vision, "text_cfg": text})


def build(name: str, folder: Path, objective: str = "clip", **knobs: Any) -> model.DualEncoder:
    method = objectives.find(objective)
    options = config.Model(name=name, pretrained=str(folder), **knobs)
    return model.build(options, [method(method.Options())], seed=0, device=torch.device("cpu")).eval()


@torch.no_grad()
def assert_same_features(encoder: model.DualEncoder, saved: Any) -> None:
    """In fp64, where two orders of the same sums differ by 1e-15; the tensors themselves are fp32's."""
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    towers, saved = encoder.towers.double(), saved.double()
    wanted = saved(input_ids=IDS, pixel_values=pixels)
    for mine, theirs in (
        (towers.encode_image(pixels), wanted.image_embeds),
        (towers.encode_text(IDS), wanted.text_embeds),
    ):
        assert torch.nn.functional.normalize(mine, dim=-1).sub(theirs).abs().max() < 1e-12
    assert encoder.towers.logit_scale.item() == 3.0


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_clip_model_gives_the_features_it_gave(tmp_path: Path, act: str) -> None:
    saved = saved_clip(tmp_path / "saved", act)
    encoder = build(clip_model(tmp_path), tmp_path / "saved", quick_gelu=act == "quick_gelu")
    assert_same_features(encoder, saved)


def test_a_siglip_model_gives_the_features_it_gave(tmp_path: Path) -> None:
    saved = saved_siglip(tmp_path / "saved")
    encoder = build(siglip_model(tmp_path), tmp_path / "saved", "siglip")
    assert_same_features(encoder, saved)
    assert encoder.towers.logit_bias.item() == pytest.approx(float(saved.logit_bias.detach()))
    assert encoder.image_spec.mean == (0.5, 0.5, 0.5)


def test_the_older_file_in_pieces_and_other_pixels(tmp_path: Path) -> None:
    """pytorch_model.bin, safetensors in shards, half precision, and the preprocessing beside them."""
    saved_clip(tmp_path / "whole")
    name, tensors = clip_model(tmp_path), load_file(tmp_path / "whole" / "model.safetensors")
    wanted = build(name, tmp_path / "whole", quick_gelu=True).towers.state_dict()
    (tmp_path / "older").mkdir()
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "older" / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "older" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    tensors["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    torch.save(tensors, tmp_path / "older" / "pytorch_model.bin")
    transformers.CLIPModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    assert (tmp_path / "cut" / "model.safetensors.index.json").is_file()
    for folder in ("older", "cut"):
        found = build(name, tmp_path / folder, quick_gelu=True)
        assert all(torch.equal(found.towers.state_dict()[key], value) for key, value in wanted.items())
        assert found.image_spec.mean == ((0.1, 0.2, 0.3) if folder == "older" else wanted_mean())


def wanted_mean() -> tuple[float, ...]:
    return tuple(open_clip.OPENAI_DATASET_MEAN)


@pytest.mark.parametrize(
    ("text", "knobs", "says"),
    [
        ({}, {"heads": 4}, "text heads 2, here 4"),
        ({}, {"no_causal_mask": True}, "text mask causal, here none"),
        ({}, {"layers": 3}, "missing"),
        ({"eos_token_id": 40}, {}, "text pooling token 40, here argmax"),
        ({"layer_norm_eps": 1e-6}, {}, "text norm eps 1e-06, here 1e-05"),
        ({"hidden_act": "gelu"}, {}, r"hidden_act \['quick_gelu', 'gelu'\] of its towers"),
        ({"hidden_act": "relu"}, {}, "hidden_act 'relu' is none of"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, text: dict[str, Any], knobs: dict[str, Any], says: str) -> None:
    saved_clip(tmp_path / "saved", **text)
    with pytest.raises(UserError, match=says) as caught:
        build(clip_model(tmp_path, **knobs), tmp_path / "saved", quick_gelu=True)
    assert "\n" not in str(caught.value)


def test_another_activation_is_refused_or_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_clip(tmp_path / "clip", "quick_gelu")
    with pytest.raises(
        UserError, match=r"was trained with QuickGELU but .* computes GELU: set model\.quick_gelu: true"
    ):
        build(clip_model(tmp_path), tmp_path / "clip")
    saved_siglip(tmp_path / "siglip", "gelu_pytorch_tanh")
    with caplog.at_level(logging.WARNING):
        build(siglip_model(tmp_path, act_kwargs={"approximate": "tanh"}), tmp_path / "siglip", "siglip")
    assert "image activation GELU (tanh), here GELU" in caplog.text
    assert "text activation" not in caplog.text


def test_other_models_and_folders_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"model_type 'bert' in config\.json is not clip or siglip"):
        build("debug-tiny", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"no model\.safetensors or pytorch_model\.bin"):
        build("debug-tiny", tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        build("debug-tiny", tmp_path)
