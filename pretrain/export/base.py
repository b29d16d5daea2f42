"""What a format must do, what a user is told, and the images and texts on which two libraries are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from pretrain.model import DualEncoder

Tower = Literal["both", "image", "text"]

TEXTS = (
    "a photo of a cat.",
    "A Diagram, with PUNCTUATION; and 1234 numbers",
    "naïve café, 北京, emoji 🙂",
    "a caption that is far too long for the text tower " * 20,
    "",
)
"""Ordinary, odd, overlong and empty."""


@dataclass(frozen=True)
class Report:
    """What an export made."""

    folder: str
    format: str
    source: str
    """The checkpoint."""
    step: int
    average: bool
    """Whether the averaged weights were taken."""
    size_bytes: int
    parity: dict[str, Any]
    """What was compared in a fresh process, and by how much it differed."""


class Format(Protocol):
    """A module of this package."""

    @staticmethod
    def write(encoder: DualEncoder, folder: Path, tower: Tower) -> None:
        """Fill a folder. UserError where the format cannot hold that tower."""
        ...

    @staticmethod
    def check(encoder: DualEncoder, folder: Path) -> dict[str, Any]:
        """Load the folder as its users do, in a fresh process, and compare. RuntimeError where it differs."""
        ...


def probe_images(size: tuple[int, int]) -> list[Image.Image]:
    """RGB images to compare on: a model's (height, width), wide, tall, tiny and large; smooth and noisy."""
    height, width = size
    shapes = [(height, width), (height, 3 * width), (2 * height + 1, width), (7, 5), (4 * height, 4 * width + 3)]
    return [_picture(number, *shape) for number, shape in enumerate(shapes)]


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Largest absolute difference by name, 0.0 only where all bits agree; or what keeps two tensors from comparison."""
    return {name: _difference(ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})}


def _difference(ours: Tensor | None, theirs: Tensor | None) -> float | str:
    if ours is None or theirs is None:
        return "only here" if theirs is None else "only there"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {list(ours.shape)} here, {theirs.dtype} {list(theirs.shape)} there"
    if ours.numpy().tobytes() == theirs.numpy().tobytes():
        return 0.0
    largest = float((ours.double() - theirs.double()).abs().max())
    return largest or "another sign of zero"


def _picture(number: int, height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, width)[None, :, None] + np.linspace(0, 128, height)[:, None, None]
    return Image.fromarray(((noise + ramp * number) / (1 + 1.5 * number)).astype(np.uint8))
