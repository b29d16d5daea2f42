"""What packing does to a sample's image and captions on their way into a shard, and how often it had to."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable

from PIL import Image

from pretrain.data.images.decode import BadSample, Encoded, decode
from pretrain.data.packing.how import How
from pretrain.data.texts.cleaning import Cleaning

_SPARE = 1.5
"""A JPEG is unpacked at no less than this many times the size it is to get."""
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class Polish:
    """Proves images, shrinks them where asked, cleans captions where asked."""

    def __init__(self, how: How) -> None:
        self._how = how
        self._clean = Cleaning(how.min_words, how.max_words) if how.clean else None
        self.changed = Counter[str]()
        """What was done, and to how many: 'images shrunk', 'captions: tags', ..."""

    def image(self, data: bytes, extension: str) -> tuple[bytes, str, tuple[int, int]]:
        """An encoded image -> the bytes to pack, the extension that fits them, and (width, height) in pixels.

        The bytes are those that came unless the image has to shrink; then they are a JPEG of the upright image.

        Args:
            extension: kept where the content is no JPEG, PNG or WebP.

        Raises:
            BadSample: it does not decode.
        """
        encoded = Encoded(data)
        upright = encoded.size if encoded.turn < 5 else (encoded.size[1], encoded.size[0])
        size = self._fitting(upright)
        if size == upright:
            _prove(encoded)
            with Image.open(io.BytesIO(data)) as header:
                return data, _EXTENSION.get(header.format or "", extension), size
        file = io.BytesIO()
        _shrunk(data, encoded, size).save(file, "JPEG", quality=self._how.quality)
        self.changed["images shrunk"] += 1
        return file.getvalue(), "jpg", size

    def captions(self, texts: Iterable[str]) -> list[str]:
        """The captions to pack. BadSample: none is left."""
        before = list(texts)
        if not before:
            raise BadSample("there is no caption")
        after = self.texts(before)
        if not after:
            raise BadSample("no caption is left after cleaning")
        return after

    def texts(self, texts: list[str]) -> list[str]:
        """The captions of one field, cleaned where asked; may be empty."""
        if self._clean is None:
            return texts
        changed = Counter[str]()
        kept = self._clean(texts, changed)
        self.changed.update({f"captions: {step}": times for step, times in changed.items()})
        return kept

    def _fitting(self, size: tuple[int, int]) -> tuple[int, int]:
        """Both sides shrunk by one factor, never enlarged; the side that a limit is on gets exactly that length."""
        short, long = self._how.resize, self._how.max_side
        factors = [1.0, *([short / min(size)] if short else []), *([long / max(size)] if long else [])]
        factor = min(factors)
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _prove(encoded: Encoded) -> None:
    """Unpack all of an image. At an eighth of its size a JPEG is read to its end, and most of the work is left out."""
    if not (encoded.plain_jpeg and encoded.scaled(1) is not None):
        encoded.image()


def _shrunk(data: bytes, encoded: Encoded, size: tuple[int, int]) -> Image.Image:
    """The upright image at `size`; a JPEG is unpacked at a fraction of its size where that is still large enough."""
    for eighths in (1, 2, 4):
        part = encoded.size[0] * eighths / 8, encoded.size[1] * eighths / 8
        if not encoded.plain_jpeg or encoded.turn != 1 or min(part[0] / size[0], part[1] / size[1]) < _SPARE:
            continue
        pixels = encoded.scaled(eighths)
        if pixels is not None:
            return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box=(0.0, 0.0, *part))
    return decode(data).resize(size, Image.Resampling.BICUBIC)
