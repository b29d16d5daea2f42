"""Starting from weights: tags, files, folders of exports and of runs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pretrain import checkpoint, config, model
from pretrain.checkpoint import State
from pretrain.errors import UserError
from pretrain.towers import architecture, weights
from pretrain.world import World

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


@dataclass(frozen=True)
class SigLip(Clip):
    init_logit_scale: float = 10.0
    init_logit_bias: float | None = -10.0
    max_logit_scale: float = math.inf


def build(seed: int = 0, objective: Clip | None = None, **knobs: Any) -> model.DualEncoder:
    return model.build(config.Model(**{"name": "debug-tiny"} | knobs), objective or Clip(), seed, CPU)


def assert_same(encoder: model.DualEncoder, tensors: dict[str, torch.Tensor]) -> None:
    found = encoder.towers.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def write_run(
    folder: Path, encoder: model.DualEncoder, text: str, average: dict[str, torch.Tensor] | None = None
) -> Path:
    state = State(
        3, 12, dict(encoder.towers.state_dict()), average, {"step/x": torch.ones(1)}, {}, {"t": torch.ones(1)}
    )
    return checkpoint.save(folder, state, HERE, text)


CONFIG = "data: {train: [synthetic:1024]}\nmodel: {name: debug-tiny}\ntrain: {samples: 12, global_batch: 4}\n"


@pytest.mark.parametrize("kind", ["plain.pt", "trainer.pt", "ddp.bin", "compiled.pth", "plain.safetensors"])
def test_files_of_every_kind(tmp_path: Path, kind: str) -> None:
    source, path = build(seed=1).towers.state_dict(), tmp_path / kind
    prefix = {"ddp.bin": "module.", "compiled.pth": "module._orig_mod."}.get(kind, "")
    tensors = {prefix + name: tensor for name, tensor in source.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"epoch": 3, "state_dict": tensors, "name": "run"} if kind == "trainer.pt" else tensors, path)
    assert_same(build(seed=2, pretrained=str(path)), dict(source))


def test_d15_a_loaded_scale_survives_the_clamp_bit_for_bit(tmp_path: Path) -> None:
    source = build(seed=1)
    with torch.no_grad():
        source.towers.logit_scale.fill_(4.7215)
    save_file(dict(source.towers.state_dict()), tmp_path / "start.safetensors")
    encoder = build(pretrained=str(tmp_path / "start.safetensors"))
    encoder.clamp()
    assert torch.equal(encoder.towers.logit_scale, source.towers.logit_scale)
    assert encoder.max_logit_scale == pytest.approx(112.3, abs=0.1)


def test_d14_a_clip_checkpoint_under_siglip(tmp_path: Path) -> None:
    save_file(dict(build(seed=1).towers.state_dict()), tmp_path / "clip.safetensors")
    encoder = build(objective=SigLip(), pretrained=str(tmp_path / "clip.safetensors"))
    assert encoder.towers.logit_scale.exp().item() == pytest.approx(10)
    assert encoder.towers.logit_bias.item() == -10


def test_a_siglip_checkpoint_under_siglip_and_under_clip(tmp_path: Path) -> None:
    source = build(seed=1, objective=SigLip())
    with torch.no_grad():
        source.towers.logit_scale.fill_(4.5)
        source.towers.logit_bias.fill_(-12.5)
    save_file(dict(source.towers.state_dict()), tmp_path / "siglip.safetensors")
    assert_same(build(objective=SigLip(), pretrained=str(tmp_path / "siglip.safetensors")), source.towers.state_dict())
    clip = build(pretrained=str(tmp_path / "siglip.safetensors"))
    assert clip.towers.logit_bias is None
    assert clip.towers.logit_scale.item() == 4.5


class Canary:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"state_dict": build().towers.state_dict(), "extra": Canary(canary)}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="holds more than tensors") as caught:
        build(pretrained=str(tmp_path / "bad.pt"))
    assert not canary.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.pt", "there is no such file"),
        ("damaged.pt", "damaged"),
        ("damaged.safetensors", "damaged"),
        ("empty.pt", "no model's state_dict"),
        ("list.pt", "holds a list"),
        ("weights.npz", "no file, folder or tag"),
        ("laion3b", "its tags: none"),
        (".", "neither a run folder nor a checkpoint"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"PK nothing")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 4)
    (tmp_path / "weights.npz").touch()
    torch.save({}, tmp_path / "empty.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match=says) as caught:
        build(pretrained=name if name == "laion3b" else str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_told(tmp_path: Path) -> None:
    tensors = dict(build().towers.state_dict())
    tensors["visual.proj"] = torch.ones(3, 3)
    tensors["stranger"] = tensors.pop("ln_final.weight")
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"does not fit model.name debug-tiny") as caught:
        build(pretrained=str(tmp_path / "other.safetensors"))
    for part in ("1 missing (ln_final.weight)", "1 unexpected (stranger)", "visual.proj [3, 3] for [32, 32]"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_positions_of_another_resolution_are_resized(tmp_path: Path) -> None:
    save_file(dict(build(seed=1).towers.state_dict()), tmp_path / "small.safetensors")
    towers = json.loads((architecture.SHIPPED / "debug-tiny.json").read_text())
    towers["vision_cfg"]["image_size"] = 64
    (tmp_path / "debug-tiny-64.json").write_text(json.dumps(towers))
    encoder = build(name=str(tmp_path / "debug-tiny-64.json"), pretrained=str(tmp_path / "small.safetensors"))
    assert encoder.towers.visual.positional_embedding.shape[0] == 65
    assert encoder.image_spec.size == (64, 64)


def test_native_weights_fit_the_custom_text_model(tmp_path: Path) -> None:
    source = build(seed=1)
    save_file(dict(source.towers.state_dict()), tmp_path / "native.safetensors")
    towers = json.loads((architecture.SHIPPED / "debug-tiny.json").read_text())
    (tmp_path / "debug-custom.json").write_text(json.dumps(towers | {"custom_text": True}))
    encoder = build(name=str(tmp_path / "debug-custom.json"), pretrained=str(tmp_path / "native.safetensors"))
    texts = torch.randint(1, 49000, (3, 16))
    assert torch.equal(encoder.encode_text(texts), source.encode_text(texts))


@pytest.mark.parametrize(
    ("name", "quick_gelu", "fix"),
    [("ViT-B-32", False, "set model.quick_gelu: true"), ("ViT-B-32-quickgelu", False, None), ("ViT-B-32", True, None)],
)
def test_a_tag_of_another_activation_is_refused_before_any_download(
    name: str, quick_gelu: bool, fix: str | None
) -> None:
    options = config.Model(name=name, pretrained="openai", quick_gelu=quick_gelu)
    towers = architecture.find(options).towers
    if fix is None:
        found = weights.origin(options, towers)
        assert found is not None
        assert found.quick_gelu is True
        return
    with pytest.raises(UserError, match=fix):
        model.build(options, Clip(), 0, CPU)


def test_a_tag_brings_its_preprocessing() -> None:
    options = config.Model(name="ViT-B-16-SigLIP", pretrained="webli")
    found = weights.origin(options, architecture.find(options).towers)
    assert found is not None
    assert found.preprocess["resize_mode"] == "squash"
    assert found.preprocess["mean"] == (0.5, 0.5, 0.5)
    assert "size" not in found.preprocess


def test_a_failed_download_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tag: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(weights.open_clip, "download_pretrained", refuse)
    with pytest.raises(UserError, match=r"could not be downloaded .no route to host") as caught:
        build(name="ViT-B-32", pretrained="laion2b_e16")
    assert "\n" not in str(caught.value)


def test_a_run_is_restored_and_started_from(tmp_path: Path) -> None:
    source, other = build(seed=1, objective=SigLip()), build(seed=2, objective=SigLip())
    folder = write_run(tmp_path, source, CONFIG)
    restored = model.restore(folder, False, CPU)
    assert not restored.training
    assert_same(restored, source.towers.state_dict())
    assert_same(build(seed=5, objective=SigLip(), pretrained=str(tmp_path)), source.towers.state_dict())
    averaged = write_run(tmp_path / "second", source, CONFIG, dict(other.towers.state_dict()))
    assert_same(model.restore(averaged, True, CPU), other.towers.state_dict())
    assert_same(model.restore(averaged, False, CPU), source.towers.state_dict())
    assert_same(build(seed=5, objective=SigLip(), pretrained=str(averaged)), other.towers.state_dict())


def test_a_run_with_another_activation_is_no_start(tmp_path: Path) -> None:
    write_run(tmp_path, build(seed=1), CONFIG)
    with pytest.raises(UserError, match="trained with GELU"):
        build(pretrained=str(tmp_path), quick_gelu=True)


def test_an_exported_folder_is_a_start_with_its_preprocessing(tmp_path: Path) -> None:
    source = build(seed=1)
    save_file(dict(source.towers.state_dict()), tmp_path / "open_clip_model.safetensors")
    preprocess = {"size": 99, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}
    description = {"model_cfg": source.architecture.towers, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
    encoder = build(seed=2, pretrained=str(tmp_path))
    assert_same(encoder, source.towers.state_dict())
    assert encoder.image_spec.mean == (0.5, 0.5, 0.5)
    assert encoder.image_spec.resize_mode == "squash"
    assert encoder.image_spec.size == (32, 32)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        build(pretrained=str(tmp_path))
