"""How samples are packed: the options that all kinds of `pretrain pack` share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pretrain.errors import UserError

MAX_PER_SHARD = 100_000
_FREE = ("workers", "index_dir")
"""What changes no byte of a shard."""


@dataclass(frozen=True)
class How:
    samples_per_shard: int = 10_000
    """Inputs that each tar is made of; those that cannot be used leave it smaller."""
    max_shard_mb: float | None = None
    """Go on in another tar of the same inputs at this many MB; tars are then named 00000-00.tar."""
    resize: int | None = None
    """Shrink the shorter side to this many pixels; default: files go in as they are."""
    max_side: int | None = None
    """Shrink the longer side to this many pixels."""
    quality: int = 95
    """JPEG quality of images that were shrunk."""
    clean: bool = False
    """Clean captions: HTML entities and tags, control characters, Unicode NFC, white space, repeated captions."""
    min_words: int | None = None
    """With clean: drop captions of fewer words."""
    max_words: int | None = None
    """With clean: drop captions of more words."""
    workers: int = 0
    """Processes; 0: one for each core. Changes no byte."""
    index_dir: str | None = None
    """For pack shards: folder for the indexes of the shards that are read, where theirs is read-only or remote."""

    def __post_init__(self) -> None:
        """Raises: UserError: a value that cannot be."""
        if not 1 <= self.samples_per_shard <= MAX_PER_SHARD:
            raise UserError(f"samples_per_shard {self.samples_per_shard} must lie between 1 and {MAX_PER_SHARD}")
        for name in ("max_shard_mb", "resize", "max_side", "min_words", "max_words"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} {value} must be positive; leave it out for no limit")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality} must lie between 1 and 100, as JPEG has it")
        if self.workers < 0:
            raise UserError(f"workers {self.workers} must be at least 0; 0 takes every core")
        if not self.clean and (self.min_words is not None or self.max_words is not None):
            raise UserError("min_words and max_words drop captions only with clean; add --clean")
        if (self.min_words or 0) > (self.max_words or float("inf")):
            raise UserError(f"min_words {self.min_words} is more than max_words {self.max_words}; no caption fits")

    def facts(self) -> dict[str, Any]:
        """What the bytes of the shards depend on."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}
