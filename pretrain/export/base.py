"""What a format must do, what may be asked of it, and what a user is told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from pretrain import config
from pretrain.errors import UserError
from pretrain.model import DualEncoder

Tower = Literal["both", "image", "text"]
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Asked:
    """What is to be written."""

    tower: Tower = "both"
    precision: Precision = "fp32"
    """Of weights and arithmetic; int8 quantises activations as they come."""
    patch_tokens: bool = False
    """Whether images also give each patch's features, projected as the whole image's are."""
    embeddings: bool = False
    """Whether texts come as the embeddings of their tokens, for prompts that are learned."""

    @property
    def image(self) -> bool:
        return self.tower != "text"

    @property
    def text(self) -> bool:
        return self.tower != "image"


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, as formats take it."""

    encoder: DualEncoder
    """On the CPU, in fp32, in evaluation mode."""
    run: config.Run
    step: int
    samples: int
    """Pairs that training had seen."""
    average: bool
    """Whether these are the averaged weights."""


@dataclass(frozen=True)
class Limit:
    """How far a copy's features may be from the encoders' own."""

    largest: float = 0.0
    """Absolute difference of any number; 0.0: every bit agrees."""
    cosine: float | None = None
    """If given, this counts in place of `largest`: the least cosine of two features."""


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

    CONSUMER: str
    """The script in consumers/ that loads such a folder with its users' library alone."""
    OPTIONS: frozenset[str]
    """Fields of `Asked` that the format follows, beside `tower`."""
    EXTRA: str
    """The extra of this package that brings its libraries; '' where none is needed."""
    ROUNDS_CROPS: bool
    """Whether its users' preprocessing places a crop by rounding, as open_clip's does; transformers' cuts off."""

    @staticmethod
    def write(trained: Trained, folder: Path, asked: Asked) -> None:
        """Fill a folder. UserError where the format cannot hold what is asked for."""
        ...

    @staticmethod
    def limit(asked: Asked) -> Limit:
        """How far its features may be off."""
        ...


def refuse_unknown(name: str, options: frozenset[str], asked: Asked) -> None:
    """UserError where a format is asked for something that it does not know."""
    plain = Asked()
    for item in fields(Asked):
        value = getattr(asked, item.name)
        if item.name != "tower" and item.name not in options and value != getattr(plain, item.name):
            flag = item.name.replace("_", "-") + ("" if value is True else f" {value}")
            known = ", ".join(f"--{each.replace('_', '-')}" for each in sorted(options)) or "only --tower"
            raise UserError(f"--{flag}: {name} folders have no such form; the format knows {known}")
    if asked.patch_tokens and not asked.image:
        raise UserError("--patch-tokens: the text tower has no patches; export image or both towers")
    if asked.embeddings and not asked.text:
        raise UserError("--embeddings: the image tower takes no texts; export text or both towers")
