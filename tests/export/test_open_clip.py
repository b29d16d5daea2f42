"""An exported folder gives the same bits in a fresh process, activation and preprocessing included."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pretrain import checkpoint, config, export, model
from pretrain.checkpoint import State
from pretrain.compat import open_clip
from pretrain.errors import UserError
from pretrain.export import open_clip as to_open_clip
from pretrain.export import proof
from pretrain.export.base import Asked, Trained
from pretrain.world import World

CPU = torch.device("cpu")
PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos32"


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


SIGLIP = Clip(10.0, -10.0, math.inf)


def write_run(folder: Path, objective: Clip = SIGLIP, average: bool = False, **knobs: Any) -> Path:
    """A run folder whose weights (seed 1) and average (seed 2) have learned a scale and a bias."""
    options = {"name": "debug-tiny"} | knobs
    made = [model.build(config.Model(**options), objective, seed, CPU).towers.state_dict() for seed in (1, 2)]
    for tensors in made:
        tensors["logit_scale"].fill_(3.3)
    fields = ", ".join(f"{key}: {json.dumps(value)}" for key, value in options.items())
    text = f"data: {{train: [synthetic:1024]}}\nmodel: {{{fields}}}\ntrain: {{samples: 12, global_batch: 4}}\n"
    other = {"step/x": torch.ones(1)}
    state = State(7, 28, dict(made[0]), dict(made[1]) if average else None, other, {}, {"t": torch.ones(1)})
    checkpoint.save(folder, state, World(0, 1, 0, CPU), text)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "quick-gelu", "quickgelu-json", "custom-text", "squash"])
def test_the_export_is_equal_in_a_fresh_process(tmp_path: Path, kind: str) -> None:
    knobs: dict[str, Any] = {"quick_gelu": True} if kind == "quick-gelu" else {}
    towers = open_clip.get_model_config(model.architecture.register("debug-tiny"))
    if kind in ("quickgelu-json", "custom-text"):
        change = {"quick_gelu": True} if kind == "quickgelu-json" else {"custom_text": True}
        (tmp_path / f"export-{kind}.json").write_text(json.dumps(towers | change))
        knobs = {"name": str(tmp_path / f"export-{kind}.json")}
    if kind == "squash":
        start = model.build(config.Model(name="debug-tiny"), SIGLIP, 4, CPU)
        (tmp_path / "start").mkdir()
        save_file(dict(start.towers.state_dict()), tmp_path / "start" / "open_clip_model.safetensors")
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"}
        described = {"model_cfg": towers, "preprocess_cfg": preprocess}
        (tmp_path / "start" / "open_clip_config.json").write_text(json.dumps(described))
        knobs = {"pretrained": str(tmp_path / "start")}
    report = export.export(write_run(tmp_path / "run", **knobs), tmp_path / "out", "open_clip")
    compared = {"image_features", "text_features", "pixels", "tokens", "logit_scale", "logit_bias"}
    assert report.parity["largest_difference"] == dict.fromkeys(sorted(compared), 0.0)
    stored = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert stored["model_cfg"]["quick_gelu"] == kind.startswith("quick")
    assert stored["preprocess_cfg"]["resize_mode"] == ("squash" if kind == "squash" else "shortest")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    report = export.export(write_run(folder / "run", average=True, quick_gelu=True), folder / "out", "open_clip")
    assert (report.step, report.average, report.format) == (7, True, "open_clip")
    assert report.size_bytes > 1_000_000
    return folder


@pytest.mark.slow
def test_the_average_is_what_leaves(exported: Path) -> None:
    stored = load_file(exported / "out" / to_open_clip.WEIGHTS)
    averaged = checkpoint.read_weights(checkpoint.locate(exported / "run"), True)
    assert all(torch.equal(stored[name], averaged[name]) for name in averaged)
    parity = json.loads((exported / "out" / "parity.json").read_text())
    assert parity["step"] == 7
    assert set(parity["parity"]["largest_difference"].values()) == {0.0}


@pytest.mark.slow
def test_real_photos_give_the_same_features(exported: Path) -> None:
    photos = sorted(path for path in PHOTOS.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not photos:
        pytest.skip(f"no photos in {PHOTOS}")
    encoder = model.restore(checkpoint.locate(exported / "run"), True, CPU)
    images = [Image.open(path).convert("RGB") for path in photos[:6]]
    encoder.precision = "fp32"
    ours = proof.here(encoder, Asked(), images)
    (exported / "photos").mkdir()
    proof.lay_out(exported / "photos", Asked(), images, ours)
    proof.consume("with_open_clip", [(exported / "out", exported / "photos")])
    assert torch.equal(ours["image_features"], proof.results(exported / "photos")[0]["image_features"])


@pytest.mark.slow
def test_an_export_is_a_start_for_another_run(exported: Path) -> None:
    options = config.Model(name="debug-tiny", quick_gelu=True, pretrained=str(exported / "out"))
    encoder = model.build(options, SIGLIP, 9, CPU)
    stored = load_file(exported / "out" / to_open_clip.WEIGHTS)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in encoder.towers.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["activation", "preprocessing", "weights", "bias"])
def test_an_unequal_export_is_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """The trap of years: weights of one activation under the description of another."""
    write = to_open_clip.write

    def damaged(trained: Trained, folder: Path, asked: Asked) -> None:
        write(trained, folder, asked)
        path = folder / to_open_clip.CONFIG
        described = json.loads(path.read_text())
        if damage == "activation":
            described["model_cfg"]["quick_gelu"] = False
        elif damage == "preprocessing":
            described["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
        elif damage == "bias":
            del described["model_cfg"]["init_logit_bias"]
        else:
            tensors = load_file(folder / to_open_clip.WEIGHTS)
            tensors["visual.proj"][0, 0] += 1e-3
            save_file(tensors, folder / to_open_clip.WEIGHTS)
        path.write_text(json.dumps(described))

    monkeypatch.setattr(to_open_clip, "write", damaged)
    says = "cannot load the export" if damage == "bias" else "gives other results"
    with pytest.raises(RuntimeError, match=says):
        export.export(write_run(tmp_path / "run", quick_gelu=True), tmp_path / "out", "open_clip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"asked": Asked(tower="image")}, "tower image: an open_clip folder needs both towers"),
        ({"asked": Asked(precision="int8")}, "--precision int8: open_clip folders have no such form"),
        ({"asked": Asked("text", patch_tokens=True), "to": "onnx"}, "the text tower has no patches"),
        ({"to": "openclip"}, "did you mean open_clip"),
        ({"average": True}, "no averaged weights"),
        ({"out": "run"}, "exists and is not empty"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    run = write_run(tmp_path / "run")
    call = {"out": "out", "to": "open_clip"} | options
    with pytest.raises(UserError, match=says) as caught:
        export.export(run, tmp_path / call.pop("out"), **call)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_names() -> None:
    wanted = ["onnx", "open_clip", "safetensors", "sentence_transformers", "torch_export", "transformers"]
    assert export.names() == wanted
