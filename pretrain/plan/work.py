"""What a step's towers do and hold, by rows: numbers that `trace` finds and the rest of the plan reckons with."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.plan.towers import Sizes


@dataclass(frozen=True)
class Linear:
    """A quantity that grows with the rows of a pass."""

    fixed: float
    per_row: float

    def at(self, rows: int) -> float:
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Highest:
    """The largest of quantities that grow with the rows: a peak, which moves through a pass as its rows grow."""

    lines: tuple[Linear, ...]

    def at(self, rows: int) -> float:
        return max(line.at(rows) for line in self.lines)


@dataclass(frozen=True)
class Spent:
    """What a device is asked to do."""

    products: Linear
    """FLOP of matrix products and convolutions."""
    attention: Linear
    """FLOP of scaled dot products; what a fused kernel computes again inside itself is not counted."""
    moved: Linear
    """Bytes that all other operators read and write."""
    calls: Linear
    """Operators, views left out."""


@dataclass(frozen=True)
class Tower:
    """One tower as configured: precision, checkpointing and patch dropout count."""

    name: str
    """'image' or 'text'."""
    parameters: int
    model_flops: tuple[float, float]
    """FLOP of one row, forward and backward, without anything that is computed twice."""
    forward: Spent
    whole: Spent
    """Forward and backward; what checkpointing computes again is in it."""
    saved: Linear
    """Bytes that wait for the backward pass, casts of weights included."""
    forward_peak: Highest
    """Bytes held at most while it runs forward with gradients."""
    alone_peak: Highest
    """The same without gradients."""
    backward_peak: Highest
    """Bytes held at most while it runs backward, gradients of weights left out."""
    backward_peak_with_gradients: Highest
    """The same with gradients of its weights, which come as activations go."""


@dataclass(frozen=True)
class Work:
    """Both towers, and what they are fed with."""

    image: Tower
    text: Tower
    sizes: Sizes
    width: int
    """D of the features."""
    pair_bytes: int
    """Of a pair as it lies on the device: uint8 pixels and token ids, further views and captions included."""
    image_rows: int = 1
    """Rows that the image tower sees of a pair: itself and further views."""
    text_rows: int = 1
    assumed: tuple[str, ...] = ()
    """What of the config the trace could not follow, in words."""

    @property
    def towers(self) -> tuple[tuple[Tower, int], ...]:
        """Each with its rows of a pair, in the order in which they run forward."""
        return (self.text, self.text_rows), (self.image, self.image_rows)

    @property
    def flops(self) -> float:
        """Of a pair, forward and backward: what MFU counts."""
        return sum(rows * sum(tower.model_flops) for tower, rows in self.towers)
