"""Weights alone: model.safetensors under open_clip's names, architecture and preprocessing in its metadata."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from pretrain.export.base import Asked, Limit, Trained
from pretrain.export.open_clip import model_cfg
from pretrain.model import DualEncoder

CONSUMER, OPTIONS = "with_safetensors", frozenset[str]()
EXTRA, ROUNDS_CROPS = "", True


def write(trained: Trained, folder: Path, asked: Asked) -> None:
    """Write the tensors of the tower, or of both with scale and bias."""
    encoder = trained.encoder
    described = {"model_cfg": model_cfg(encoder), "preprocess_cfg": encoder.architecture.preprocess}
    metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in described.items()}
    wanted = {"both": ("image", "text", "head"), "image": ("image",), "text": ("text",)}[asked.tower]
    states = encoder.towers.state_dict()
    kept = {name: x.detach().contiguous() for name, x in states.items() if DualEncoder.tower_of(name) in wanted}
    save_file(kept, folder / "model.safetensors", metadata=metadata)


def limit(asked: Asked) -> Limit:
    return Limit()
