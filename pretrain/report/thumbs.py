"""Small copies of pictures, as files in memory."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def small(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    """A copy that fits into a square; a picture that is smaller is enlarged.

    Args:
        pixels: [H, W, 3].
    """
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def jpeg(pixels: NDArray[np.uint8], side: int) -> bytes:
    """The same as JPEG."""
    out = io.BytesIO()
    small(pixels, side).save(out, "JPEG", quality=80)
    return out.getvalue()


def heat(values: NDArray[np.float32]) -> bytes:
    """[N, M] as a PNG of N x M pixels, the least dark and the largest bright."""
    low, high = float(values.min()), float(values.max())
    share = (values - low) / ((high - low) or 1.0)
    out = io.BytesIO()
    Image.fromarray(ramp(share)).save(out, "PNG", optimize=True)
    return out.getvalue()


_RAMP = np.array([(18, 24, 48), (32, 84, 150), (38, 150, 160), (140, 204, 120), (250, 236, 130)], dtype=float)


def ramp(share: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Shares between 0 and 1, [...], as colours [..., 3] whose lightness ascends."""
    at = np.clip(share, 0, 1) * (len(_RAMP) - 1)
    columns = [np.interp(at, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    return np.stack(columns, -1).round().astype(np.uint8)
