"""Bytes of an image file -> the uint8 pixels of a training row, written where the batch is.

A plain JPEG is decoded at the smallest scale at which the crop is no smaller than the result, only the crop is resized,
once, and mirroring, EXIF turns and augmentations come last, on the few pixels of the result. data.exact_pixels decodes
everything at full size and resizes with Pillow instead, as open_clip does: other pixels of the same crop.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.config import Data
from pretrain.data.images.augment import Augment
from pretrain.data.images.boxes import TURNS, Cut, Turn, random_cut
from pretrain.data.images.decode import Encoded
from pretrain.data.images.transforms import ImageSpec, resize


class Pixels:
    """The training transform. A pure function of bytes and randomness: no number of threads or workers shows.

    Args:
        spec: what the model takes.
        data: its knobs crop_scale, crop_ratio, flip, exact_pixels, augment and view_augment.

    Raises:
        UserError: data.augment or data.view_augment names what is not there.
    """

    def __init__(self, spec: ImageSpec, data: Data) -> None:
        self._spec, self._data = spec, data
        self._augment = Augment(data.augment, "data.augment", spec.mean)
        self._view_augment = Augment(data.view_augment, "data.view_augment", spec.mean)

    def train(self, encoded: bytes, rng: random.Random, out: Tensor) -> None:
        """A random crop, mirrored half of the time if data.flip, augmented as data.augment says.

        Args:
            encoded: an image file.
            rng: of this sample; the same state gives the same pixels.
            out: [3, H, W] uint8, written to.

        Raises:
            BadSample: the image cannot be used; `out` is as it was.
        """
        self._write(encoded, rng, self._augment, out)

    def view(self, encoded: bytes, rng: random.Random, out: Tensor) -> None:
        """`train` with a crop and mirroring of its own, augmented as data.view_augment says."""
        self._write(encoded, rng, self._view_augment, out)

    def _write(self, encoded: bytes, rng: random.Random, augment: Augment, out: Tensor) -> None:
        image, data, spec = Encoded(encoded), self._data, self._spec
        turn = TURNS[image.turn]
        cut = random_cut(image.size, turn, spec.size, data.crop_scale, data.crop_ratio, rng)
        mirrored = data.flip and rng.random() < 0.5
        pixels = _exact(image, cut, turn, spec) if data.exact_pixels else _fast(image, cut, turn, spec)
        if mirrored:
            pixels = pixels.flip(2)
        if augment:
            changed = augment(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), rng)
            pixels = _channels_first(np.array(changed))
        out.copy_(pixels)


def _fast(image: Encoded, cut: Cut, turn: Turn, spec: ImageSpec) -> Tensor:
    """[3, H, W] uint8. torch resizes bytes several times as fast as Pillow, and hardly ever 1 or 2 apart from it."""
    part = _part(image, cut)
    size = spec.size[::-1] if turn.transposed else spec.size
    mode = "bilinear" if spec.interpolation == "bilinear" else "bicubic"
    pixels = F.interpolate(_channels_first(part)[None], size, mode=mode, antialias=True)[0]
    if turn.transposed:
        pixels = pixels.transpose(1, 2)
    sides = [side for side, mirrored in ((2, turn.across), (1, turn.down)) if mirrored]
    return pixels.flip(sides) if sides else pixels


def _part(image: Encoded, cut: Cut) -> np.ndarray:
    """[h, w, 3] uint8: of a plain JPEG the scaled part, else the part at full size."""
    found = image.scaled(cut.eighths) if image.plain_jpeg else None
    if found is None:
        return np.array(image.image().crop(cut.box))
    left, top, right, bottom = cut.scaled
    return found[top:bottom, left:right]


def _exact(image: Encoded, cut: Cut, turn: Turn, spec: ImageSpec) -> Tensor:
    """[3, H, W] uint8: Pillow's pixels of the upright part."""
    part = np.asarray(image.image().crop(cut.box))
    if turn.transposed:
        part = part.swapaxes(0, 1)
    part = part[:: -1 if turn.down else 1, :: -1 if turn.across else 1]
    return _channels_first(np.array(resize(Image.fromarray(np.ascontiguousarray(part)), spec.size, spec.filter)))


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)
