"""Every other format, loaded by its users' library in a fresh process, gives the features that the encoders give."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain import export
from pretrain.errors import UserError
from pretrain.export.base import Asked

_SPEC = importlib.util.spec_from_file_location("tests_export_runs", Path(__file__).parent / "test_open_clip.py")
assert _SPEC is not None
assert _SPEC.loader is not None
runs = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = runs
_SPEC.loader.exec_module(runs)

FORMS = [
    ("safetensors", Asked("image"), {"model.safetensors"}),
    ("transformers", Asked(), {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}),
    ("transformers", Asked("image"), {"config.json", "model.safetensors", "preprocessor_config.json"}),
    ("transformers", Asked("text"), {"config.json", "model.safetensors", "tokenizer.json"}),
    ("sentence_transformers", Asked(), {"modules.json", "sentence_bert_config.json", "model.safetensors"}),
    ("onnx", Asked(patch_tokens=True, embeddings=True), {"image.onnx", "text.onnx", "token_embedding.safetensors"}),
    ("onnx", Asked("image", "fp16"), {"image.onnx"}),
    ("onnx", Asked("text", "int8"), {"text.onnx", "tokenizer.json"}),
    ("torch_export", Asked(patch_tokens=True), {"image.pt2", "text.pt2", "tokenizer.json"}),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = runs.write_run(tmp_path_factory.mktemp("formats") / "run", quick_gelu=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("to", "asked", "files"), FORMS)
def test_a_format_is_proven(run: Path, tmp_path: Path, to: str, asked: Asked, files: set[str]) -> None:
    report = export.export(run, tmp_path / "out", to, asked)
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}
    stored = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert stored["parity"] == report.parity
    found = report.parity["largest_difference"]
    sides = [f"{side}_features" for side in ("image", "text") if getattr(asked, side)]
    batches = [f"{side}/{size}" for side in sides for size in (1, 3, 17)]
    assert set(batches) <= set(found) or to == "safetensors"
    if asked.precision == "fp32":
        assert all(value < 1e-4 for value in found.values())
    else:
        assert all(value > 0.999 for value in report.parity["least_cosine"].values())


@pytest.mark.parametrize("to", ["transformers", "sentence_transformers"])
def test_towers_that_transformers_lacks_are_refused(tmp_path: Path, to: str) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    (tmp_path / "resnet-export.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    folder = runs.write_run(tmp_path / "run", name=str(tmp_path / "resnet-export.json"))
    with pytest.raises(UserError, match="cannot hold the image tower: it is a ModifiedResNet"):
        export.export(folder, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'pretrain\[sentence-transformers\]'"):
        export.export(run, tmp_path / "out", "sentence_transformers")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_config_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(folder: Any) -> None:
        raise FileNotFoundError("config.yaml")

    monkeypatch.setattr(export.checkpoint, "read_run", gone)
    with pytest.raises(UserError, match="has no readable config"):
        export.export(run, tmp_path / "out", "onnx")
