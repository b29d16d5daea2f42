"""Bytes of an image file -> RGB pixels, with what can go wrong turned into a reason.

Pillow decides what an image is and whether it is usable; simplejpeg only unpacks plain JPEGs faster.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 1 << 26
"""Larger images (8192 x 8192) are refused after their header, before anything is unpacked; also JPEGs that scaled
decoding would make cheap, so that no option changes which samples are used."""
MAX_SCANS, MAX_SCANNED = 500, 1 << 30
"""Scans of a JPEG, and scans times pixels. Three are usual, or ten where it is progressive, and each costs a pass over
all pixels however few bytes it takes."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_METADATA = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation; upright ones are left alone."""


class BadSample(Exception):  # noqa: N818 - not an error of the program: the data set holds such samples
    """A sample that cannot be used; the text says why."""


def decode(data: bytes) -> Image.Image:
    """An upright RGB image of 8 bits.

    EXIF orientation is applied, transparency is laid over white, 16 bits are scaled down to 8, of an animation the
    first frame is taken.

    Raises:
        BadSample: no image of a known format, damaged, cut short, or of more than MAX_PIXELS or MAX_SCANS.
    """
    with _reasons():
        image = _open(data)
        turn = _orientation(image)
        image.load()
        return to_rgb(image if turn == 1 else image.transpose(_TURNED[turn]))


class Encoded:
    """An image file of which only the header has been read; its pixels come as they are stored, not turned upright.

    Raises:
        BadSample: from here and from both ways to the pixels, as `decode` says.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        with _reasons():
            self._image = _open(data)
            self.turn = _orientation(self._image)
            """EXIF orientation, 1 to 8."""
        self.size = self._image.size
        """(width, height) as stored."""
        self.plain_jpeg = self._image.format in ("JPEG", "MPO") and self._image.mode in ("L", "RGB")

    def image(self) -> Image.Image:
        """All of it, RGB, by Pillow."""
        with _reasons():
            self._image.load()
            return to_rgb(self._image)

    def scaled(self, eighths: int) -> np.ndarray | None:
        """A plain JPEG at a fraction of its size, for which libjpeg-turbo inverts only the lower frequencies.

        Pixel i covers pixels [8 i / eighths, 8 (i + 1) / eighths) of the original; the last one may reach past its end.

        Args:
            eighths: of the width and height, 1, 2, 4 or 8.

        Returns:
            [ceil(height * eighths / 8), ceil(width * eighths / 8), 3] uint8; None: simplejpeg sees something wrong,
            and Pillow shall decide.
        """
        width, height = (-(-side * eighths // 8) for side in self.size)
        try:
            found = simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
        except ValueError:
            return None
        return found if found.shape == (height, width, 3) else None


@contextmanager
def _reasons() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is handled here, once per worker process
        try:
            yield
        except (BadSample, MemoryError):
            raise
        except UnidentifiedImageError:  # its own text holds a memory address, and reasons must be the same everywhere
            raise BadSample(f"the image does not decode: it is none of {', '.join(FORMATS)}") from None
        except Exception as error:  # decoders raise a dozen types, SyntaxError and struct.error among them
            raise BadSample(
                f"the image does not decode: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from None


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSample(f"the image has {width} x {height} pixels, the limit is {MAX_PIXELS}")
    if image.format in ("JPEG", "MPO"):
        scans = data.count(b"\xff\xda")  # inside a scan's data a zero follows each 255
        if scans > MAX_SCANS or scans * width * height > MAX_SCANNED:
            raise BadSample(f"the image has {scans} scans of {width} x {height} pixels, more than any picture needs")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF's, or XMP's; 1 where there is none, or none that can be read: such pictures are shown as they are stored."""
    if image.format != "TIFF" and not image.info.keys() & _METADATA:
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError, OSError, struct.error):
        return 1
    return found if found in _TURNED else 1


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
