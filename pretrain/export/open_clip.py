"""open_clip's own folder: `open_clip.create_model_and_transforms("local-dir:OUT")` loads it, or "hf-hub:ORG/NAME" once
it is pushed.

open_clip_config.json holds the architecture, its activation (QuickGELU or not), the bias and the preprocessing;
open_clip_model.safetensors the weights; README.md is the model card. A Hugging Face tokenizer lies beside them, CLIP's
comes with open_clip.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pretrain.errors import UserError
from pretrain.export import card, vocabulary
from pretrain.export.base import Asked, Limit, Trained
from pretrain.model import DualEncoder

CONSUMER, OPTIONS = "with_open_clip", frozenset[str]()
EXTRA, ROUNDS_CROPS = "", True
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

log = logging.getLogger("pretrain")


def write(trained: Trained, folder: Path, asked: Asked) -> None:
    """Fill a folder with config, weights, model card and, where the model has its own, tokenizer.

    Raises:
        UserError: one tower alone is asked for, or the tokenizer is gone.
    """
    if asked.tower != "both":
        raise UserError(f"--tower {asked.tower}: an open_clip folder needs both towers to load; export both")
    encoder = trained.encoder
    config = {"model_cfg": model_cfg(encoder), "preprocess_cfg": encoder.architecture.preprocess}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.towers.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    made = vocabulary.of(encoder)
    if hasattr(made, "save_pretrained"):
        made.save_pretrained(folder)
    (folder / "README.md").write_text(card.written(trained))


def limit(asked: Asked) -> Limit:
    return Limit()


def model_cfg(encoder: DualEncoder) -> dict[str, Any]:
    """The architecture as open_clip must build it to hold these weights."""
    towers = encoder.architecture.towers
    vision, text = dict(towers["vision_cfg"]), dict(towers["text_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
        if Path(text["hf_model_name"]).exists():
            log.warning(
                "the export needs the folder %s wherever it is loaded: open_clip reads the text tower's shape from it",
                text["hf_model_name"],
            )
    head: dict[str, float] = {"init_logit_scale": float(encoder.towers.logit_scale.detach())}
    if encoder.towers.logit_bias is not None:
        # Without this open_clip builds no bias at all, and then refuses the weights that have one.
        head["init_logit_bias"] = float(encoder.towers.logit_bias.detach())
    kept = {key: value for key, value in towers.items() if not key.startswith("init_logit_")}
    return kept | {"vision_cfg": vision, "text_cfg": text} | head
