"""transformers' folder: CLIPModel or SiglipModel with processor and tokenizer, or one tower with its projection.

The image processor is the one on Pillow (`...Pil`, transformers 5): its pixels are open_clip's, those of the other one,
on tensors, are off by up to one of 255 steps in some pixels.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pretrain.compat import open_clip
from pretrain.errors import UserError
from pretrain.export import towers_hf, vocabulary
from pretrain.export.base import Asked, Limit, Trained
from pretrain.model import DualEncoder

CONSUMER, OPTIONS = "with_transformers", frozenset[str]()
EXTRA, ROUNDS_CROPS = "transformers", False

log = logging.getLogger("pretrain")


def write(trained: Trained, folder: Path, asked: Asked) -> None:
    """Fill a folder with config, weights, preprocessing and tokenizer.

    Raises:
        UserError: transformers has no class for these towers, or nothing that does their preprocessing or tokens.
    """
    encoder = trained.encoder
    kind = towers_hf.kind_of(encoder, asked)
    described = towers_hf.config(encoder, kind, asked)
    if kind == "clip" and encoder.towers.logit_bias is not None and asked.tower == "both":
        described["logit_bias"] = float(encoder.towers.logit_bias.detach())
        log.warning("CLIPModel has no bias: it is config.logit_bias there, and sigmoid probabilities must add it")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    weights = towers_hf.joined_pool(towers_hf.tensors(encoder, kind, asked))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    parts = [_image_processor(encoder, kind)] if asked.image else []
    parts += [_tokenizer(encoder, kind)] if asked.text else []
    for part in parts:
        part.save_pretrained(folder)
    if asked.tower == "both":
        _processor(kind, *parts).save_pretrained(folder)


def limit(asked: Asked) -> Limit:
    return Limit(largest=1e-4)


def _tokenizer(encoder: DualEncoder, kind: str) -> Any:
    # CLIP's tower ends at the end of text; SigLIP's sees all that comes behind it.
    if kind == "siglip" and isinstance(vocabulary.of(encoder), open_clip.SimpleTokenizer):
        raise UserError(
            "transformers' CLIPTokenizer cannot pad with zeros, which this text tower has learned to see, for it has "
            "no causal mask: export --tower image, or to onnx, torch_export or open_clip"
        )
    found = vocabulary.transformers_form(encoder)
    if kind == "siglip":
        # Nor must users mask the padding; SiglipTokenizer says so with the same words.
        found.init_kwargs["model_input_names"] = ["input_ids"]
    return found


def _image_processor(encoder: DualEncoder, kind: str) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    spec = encoder.image_spec
    if spec.resize_mode == "longest":
        raise UserError("transformers' processors cannot fit the longer edge and pad (resize_mode longest)")
    height, width = spec.size
    values: dict[str, Any] = {"image_mean": [*spec.mean], "image_std": [*spec.std], "resample": int(spec.filter)}
    if spec.resize_mode == "squash":
        values |= {"size": {"height": height, "width": width}, "do_center_crop": False}
    else:
        values |= {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}
    # SiglipImageProcessor cuts nothing, so a model that was trained on crops takes CLIP's.
    squashes = kind == "siglip" and spec.resize_mode == "squash"
    return (SiglipImageProcessorPil if squashes else CLIPImageProcessorPil)(**values)


def _processor(kind: str, images: Any, texts: Any) -> Any:
    from transformers import CLIPProcessor, SiglipProcessor

    return (CLIPProcessor if kind == "clip" else SiglipProcessor)(image_processor=images, tokenizer=texts)
