"""Every kind of image file that data sets hold, and those that must not get through."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.config import Data
from pretrain.data.captions import captions_of, choose, parse_meta
from pretrain.data.decode import BadSample, decode
from pretrain.data.order import sample_random
from pretrain.data.reader import ShardSource


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def ramp(mode: str = "RGB") -> Image.Image:
    pixels = np.stack([np.tile(np.arange(0, 256, 8, dtype=np.uint8), (24, 1))] * 3, axis=2)
    pixels[..., 1] = 255 - pixels[..., 1]
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("RGB", "WEBP"),
        ("P", "GIF"),
        ("L", "JPEG"),
        ("RGB", "BMP"),
        ("CMYK", "TIFF"),
    ],
)
def test_modes_and_formats_keep_their_colours(mode: str, format: str) -> None:
    image = ramp(mode)
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    found = decode(encoded(image, format, **options))
    assert (found.mode, found.size) == ("RGB", image.size)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(image.convert("RGB")).astype(int))
    assert difference.max() <= (2 if format == "JPEG" else 0)


def test_cmyk_jpeg() -> None:
    found = np.asarray(decode(encoded(ramp("CMYK"), "JPEG", quality=100))).astype(int)
    assert np.abs(found - np.asarray(ramp()).astype(int)).mean() < 4, "not inverted"


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    wide = np.linspace(0, 65535, 32 * 24).reshape(24, 32).astype(np.uint16)
    found = np.asarray(decode(encoded(Image.fromarray(wide), "PNG")))
    assert np.array_equal(found[..., 0], np.round(wide / 257).astype(np.uint8))
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    if mode == "P":
        palette = Image.new("P", (4, 2), 1)
        palette.putpalette([10, 10, 10, 0, 0, 0])
        palette.putpixel((0, 0), 0)
        data = encoded(palette, "PNG", transparency=1)
    else:
        data = encoded(image.convert(mode), "PNG")
    found = decode(data)
    assert found.getpixel((0, 0)) == (10, 10, 10)
    assert found.getpixel((3, 1)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    found = decode(encoded(image, "JPEG", exif=exif, quality=100))
    assert found.size == (20, 40)
    assert np.asarray(found)[:20].mean() > 200, "the left half is now on top"


def bomb(width: int, height: int) -> bytes:
    """A small valid PNG that unpacks to width x height."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(b"\0" * (width + 1) * 64)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "does not decode"),
        (b"<html>404</html>", "does not decode"),
        (bomb(9000, 9000), "9000 x 9000 pixels"),
        (bomb(20_000, 20_000), "DecompressionBomb"),
        (encoded(Image.effect_noise((40, 40), 50), "PNG")[:600], "does not decode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "does not decode"),
        (encoded(Image.new("F", (3, 3)), "TIFF"), "floating-point"),
        (pickle.dumps({"a": 1}), "does not decode"),
    ],
    ids=["empty", "html", "large", "bomb", "cut-png", "postscript", "float", "pickle"],
)
def test_what_does_not_get_through(data: bytes, says: str) -> None:
    with pytest.raises(BadSample, match=says) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_cut_photographs(photos: list[Path]) -> None:
    for path in photos[:4]:
        data = path.read_bytes()
        assert decode(data).mode == "RGB"
        with pytest.raises(BadSample, match="truncated"):
            decode(data[: len(data) // 2])


class Canary:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return pytest.fail, ("a member was unpickled",)


def test_no_member_is_ever_unpickled(tmp_path: Path, tar_writer: Callable, picture_bytes: Callable[..., bytes]) -> None:
    evil = pickle.dumps(Canary())
    members = {"png": picture_bytes(0), "pkl": evil, "pyd": evil, "pth": evil, "txt": b"fine"}
    source = ShardSource([tar_writer(tmp_path / "a.tar", {"k": members})], Data())
    assert source.sample(0).captions == ["fine"]


def test_captions_in_the_order_of_the_knob_each_once() -> None:
    meta = {"caption": " b ", "captions": ["c", "", "a"], "other": "d"}
    keys = Data().text_keys
    assert captions_of({"txt": b"\xef\xbb\xbfa\n"}, meta, keys) == ["a", "b", "c"]
    assert captions_of({"txt": b"a"}, meta, ("json:other",)) == ["d"]
    assert captions_of({"txt": b" \n"}, {}, keys) == []
    with pytest.raises(BadSample, match="utf-8"):
        captions_of({"txt": "é".encode("latin-1")}, {}, keys)
    with pytest.raises(BadSample, match="neither a string"):
        captions_of({}, {"caption": 5}, keys)
    for member in (b"{", b"[1]", b"[" * 100_000):
        with pytest.raises(BadSample, match="json member"):
            parse_meta(member)


def test_choice_of_captions_is_fair_and_repeatable() -> None:
    texts = ["a", "b", "c"]
    drawn = [choose(texts, sample_random(0, position)) for position in range(3000)]
    assert drawn == [choose(texts, sample_random(0, position)) for position in range(3000)]
    assert all(900 < drawn.count(text) < 1100 for text in texts)
    with pytest.raises(BadSample, match="no caption"):
        choose([], sample_random(0, 0))
