"""Bytes of an image file -> RGB pixels, by Pillow, with what can go wrong turned into a reason."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 26
"""Larger images (8192 x 8192) are refused after their header, before anything is unpacked."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class BadSample(Exception):  # noqa: N818 - not an error of the program: the data set holds such samples
    """A sample that cannot be used; the text says why."""


def decode(data: bytes) -> Image.Image:
    """An upright RGB image of 8 bits.

    EXIF orientation is applied, transparency is laid over white, 16 bits are scaled down to 8, of an animation the
    first frame is taken.

    Raises:
        BadSample: no image of a known format, damaged, cut short, or of more than MAX_PIXELS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is handled here, once per worker process
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadSample(f"the image has {width} x {height} pixels, the limit is {MAX_PIXELS}")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
        except (BadSample, MemoryError):
            raise
        except UnidentifiedImageError:  # its own text holds a memory address, and reasons must be the same everywhere
            raise BadSample(f"the image does not decode: it is none of {', '.join(FORMATS)}") from None
        except Exception as error:  # decoders raise a dozen types, SyntaxError and struct.error among them
            raise BadSample(
                f"the image does not decode: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow knows as RGB. ValueError: there is no conversion."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):  # Pillow's own conversion clips at 255
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
