"""Sizes of a CLIP model's tensors, from its description: open_clip's own ViT and text transformer, by counting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.errors import UserError

Description = Mapping[str, Any]
_MATRICES = slice(4, None, 2)
"""Of the tensors of `_block`."""


@dataclass(frozen=True)
class Sizes:
    """Numbers (not bytes) in every tensor of a model."""

    rest: tuple[int, ...]
    """Tensors outside of blocks: embeddings, final norms, projections, scale and bias."""
    blocks: tuple[tuple[int, ...], ...]
    """Tensors of each block."""

    @property
    def tensors(self) -> tuple[int, ...]:
        return self.rest + tuple(size for block in self.blocks for size in block)

    @property
    def total(self) -> int:
        return sum(self.tensors)

    @property
    def largest(self) -> int:
        """Of the tensors."""
        return max(self.tensors)

    @property
    def largest_units(self) -> int:
        """Of the two largest parts that are gathered on their own: blocks, and tensors outside that are as large."""
        units = sorted([*map(sum, self.blocks), *self.rest])
        return sum(units[-2:])

    @property
    def matrices(self) -> int:
        """In the matrices of blocks."""
        return sum(sum(block[_MATRICES]) for block in self.blocks)

    def under(self, size: int) -> int:
        """In tensors of fewer numbers than `size`."""
        return sum(one for one in self.tensors if one < size)


def sizes(model: Description, bias: bool = False) -> Sizes:
    """Of a model in open_clip's words: embed_dim, vision_cfg, text_cfg.

    Args:
        bias: whether the loss has a bias (SigLIP), beside its scale.

    Raises:
        UserError: a tower is not open_clip's own transformer, whose tensors cannot be counted from a description.
    """
    vision, text, embed = model["vision_cfg"], model["text_cfg"], model["embed_dim"]
    if {"timm_model_name", "hf_model_name"} & {*vision, *text} or not isinstance(vision["layers"], int):
        raise UserError("plan: counts only towers that are open_clip's own transformers, and this model has another")
    width, patch, length = vision["width"], vision["patch_size"], text["context_length"]
    patches = (vision["image_size"] // patch) ** 2
    image = (3 * patch * patch * width, width, (patches + 1) * width, *[width] * 4, width * embed)
    words = text["width"]
    reading = (text["vocab_size"] * words, length * words, *[words] * 2, words * embed)
    blocks = (_block(width, vision.get("mlp_ratio", 4.0)),) * vision["layers"]
    return Sizes((*image, *reading, *[1] * (1 + bias)), blocks + (_block(words, 4.0),) * text["layers"])


def _block(width: int, mlp_ratio: float) -> tuple[int, ...]:
    """Two norms, attention in and out, two layers: weights and biases."""
    hidden = int(width * mlp_ratio)
    attention = (3 * width * width, 3 * width, width * width, width)
    return (*[width] * 4, *attention, width * hidden, hidden, hidden * width, width)


def _clip(image: tuple[int, int, int, float], text: tuple[int, int], embed: int) -> Description:
    width, layers, patch, ratio = image
    vision = {"image_size": 224, "layers": layers, "width": width, "patch_size": patch, "mlp_ratio": ratio}
    reading = {"context_length": 77, "vocab_size": 49408, "width": text[0], "layers": text[1]}
    return {"embed_dim": embed, "vision_cfg": vision, "text_cfg": reading}


PRESETS: Mapping[str, Description] = {
    "ViT-B-16": _clip((768, 12, 16, 4.0), (512, 12), 512),
    "ViT-L-14": _clip((1024, 24, 14, 4.0), (768, 12), 768),
    "ViT-bigG-14": _clip((1664, 48, 14, 4.9231), (1280, 32), 1280),
}
"""By open_clip's names; the figures are those of its model configs."""
