"""Which pairs are alike: similarities, who finds whom, which pairs are right by most and wrong by most, a flat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pretrain.report.held_out import Pairs

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Likeness:
    """Of N pairs."""

    pairs: Pairs

    @cached_property
    def cosines(self) -> NDArray[np.float32]:
        """[N, N]: image by caption."""
        found: NDArray[np.float32] = self.pairs.images @ self.pairs.texts.T
        return found

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """[N, N]: whether the caption is one of the image's own."""
        captions = self.pairs.captions
        return np.array([[caption in own for caption in captions] for own in self.pairs.others])

    @cached_property
    def different(self) -> Indices:
        """The first pair of each different caption."""
        first = {caption: n for n, caption in reversed(list(enumerate(self.pairs.captions)))}
        found: Indices = np.array(sorted(first.values()))
        return found

    @cached_property
    def margins(self) -> NDArray[np.float32]:
        """[N]: the likeness of an image's own caption minus that of the likest wrong one; below 0: it was missed."""
        wrong = np.where(self.right, -np.inf, self.cosines).max(1)
        return np.diag(self.cosines) - np.where(np.isfinite(wrong), wrong, 0.0)

    @property
    def found(self) -> float:
        """Share of images whose likest caption is one of their own."""
        likest = self.cosines.argmax(1)
        return float(self.right[np.arange(len(likest)), likest].mean())

    def some(self, most: int) -> Indices:
        """Pairs with different captions, equally far apart."""
        places = np.unique(np.linspace(0, len(self.different) - 1, most).round().astype(int))
        found: Indices = self.different[places]
        return found

    def captions_of(self, image: int, most: int) -> list[int]:
        """The likest different captions, likest first."""
        order = self.different[np.argsort(-self.cosines[image, self.different], kind="stable")]
        return [int(n) for n in order[:most]]

    def images_of(self, caption: int, most: int) -> list[int]:
        """The likest images, likest first."""
        return [int(n) for n in np.argsort(-self.cosines[:, caption], kind="stable")[:most]]

    def best(self, most: int) -> list[int]:
        """Pairs that are right by most."""
        return [int(n) for n in np.argsort(-self.margins, kind="stable")[:most]]

    def worst(self, most: int) -> list[int]:
        """Pairs that are wrong by most, or right by least."""
        return [int(n) for n in np.argsort(self.margins, kind="stable")[:most]]

    def likest_wrong(self, image: int) -> int | None:
        """The likest caption that is not the image's own; None: all are."""
        scores = np.where(self.right[image], -np.inf, self.cosines[image])
        return int(scores.argmax()) if np.isfinite(scores).any() else None


@dataclass(frozen=True)
class Flat:
    """Features in the two directions in which they spread most."""

    images: NDArray[np.float64]
    """[N, 2]."""
    texts: NDArray[np.float64]
    """[N, 2]."""
    share: float
    """Of the spread that these two directions hold."""


def flatten(pairs: Pairs, centred: bool) -> Flat:
    """Principal components of both modalities together.

    Args:
        centred: take away each modality's own centre first: what is left is without the gap between them.
    """
    parts: Sequence[NDArray[np.float64]] = [part.astype(np.float64) for part in (pairs.images, pairs.texts)]
    if centred:
        parts = [part - part.mean(0) for part in parts]
    rows = np.concatenate(parts)
    rows = rows - rows.mean(0)
    left, sizes, _ = np.linalg.svd(rows, full_matrices=False)
    flat = np.zeros((len(rows), 2))
    flat[:, : min(2, len(sizes))] = (left * sizes)[:, :2]
    spread = float((sizes**2).sum())
    return Flat(flat[: len(pairs)], flat[len(pairs) :], float((sizes[:2] ** 2).sum()) / spread if spread else 1.0)
