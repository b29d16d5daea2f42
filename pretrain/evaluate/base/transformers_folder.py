"""A CLIPModel or SiglipModel as transformers saved it, evaluated by transformers' own code.

`model.pretrained` takes such folders into open_clip's towers to train on; here nothing is converted, so any size works.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import model
from pretrain.data.rows import Tokenize
from pretrain.errors import UserError
from pretrain.towers.architecture import Architecture

KINDS = ("clip", "siglip")
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


class Towers(nn.Module):
    """Features under the names that `DualEncoder` asks for."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.logit_scale = inner.logit_scale
        self.logit_bias = getattr(inner, "logit_bias", None)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]."""
        return _pooled(self.inner.get_image_features(pixel_values=pixels))

    def encode_text(self, ids: Tensor) -> Tensor:
        """[B, L] padded as the tokenizer pads; CLIP looks back only, and SigLIP was trained to see the padding."""
        return _pooled(self.inner.get_text_features(input_ids=ids))


def load(folder: Path, device: torch.device) -> tuple[model.DualEncoder, Tokenize]:
    """The encoder and its tokenizer.

    Raises:
        UserError: transformers is missing, the model is another kind or has one tower, or weights, tokenizer or
            preprocessing are missing or damaged.
    """
    described = _described(folder)
    transformers = _library()
    inner = _read(folder, "weights", transformers.AutoModel)
    tokens = _read(folder, "tokenizer", transformers.AutoTokenizer)
    length = int(described.text_config.max_position_embeddings)
    width = int(getattr(described, "projection_dim", None) or described.text_config.projection_size)
    architecture = Architecture(str(folder.resolve()), {"embed_dim": width}, _preprocess(folder))
    encoder = model.DualEncoder(Towers(inner), architecture, "fp32").to(device).eval()

    def tokenize(texts: list[str]) -> Tensor:
        made = tokens(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = made["input_ids"]
        return ids

    return encoder, tokenize


def _pooled(found: Any) -> Tensor:
    """A tensor until transformers 4, the pooled part of an output since 5."""
    pooled: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return pooled


def _described(folder: Path) -> Any:
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: config.json is damaged ({' '.join(str(error).split())})") from None
    if kind not in KINDS:
        alone = str(kind).endswith(("_vision_model", "_text_model"))
        why = "one tower alone; an evaluation needs both" if alone else f"none of {', '.join(KINDS)}"
        raise UserError(f"{folder}: model_type {kind!r} in config.json is {why}")
    return _library().AutoConfig.from_pretrained(folder, local_files_only=True)


def _read(folder: Path, what: str, kind: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its {what} cannot be loaded, save it there too ({said})") from error


def _preprocess(folder: Path) -> dict[str, Any]:
    """open_clip's preprocess_cfg of what preprocessor_config.json says."""
    path = folder / "preprocessor_config.json"
    try:
        said = json.loads(path.read_text())
        size, crop = said["size"], said.get("crop_size")
        known = {"mean": said["image_mean"], "std": said["image_std"], "interpolation": _RESAMPLE[said["resample"]]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: preprocessor_config.json is missing or damaged ({error!r}); save it") from None
    pixels = {"fill_color": 0, "mode": "RGB", **known}
    if "height" in size and not said.get("do_center_crop"):
        return pixels | {"size": (size["height"], size["width"]), "resize_mode": "squash"}
    edge = size.get("shortest_edge", size.get("height"))
    crop = crop or {"height": edge, "width": edge}
    if (edge, edge) != (crop["height"], crop["width"]):
        raise UserError(f"{folder}: resizing to {edge} before cropping to {crop} is not supported; set both alike")
    return pixels | {"size": (edge, edge), "resize_mode": "shortest"}


def _library() -> Any:
    import pretrain.compat  # noqa: F401 - torchvision, which transformers imports, must load first

    try:
        import transformers
    except ImportError:
        raise UserError("a transformers folder needs transformers: pip install 'pretrain[transformers]'") from None
    return transformers
