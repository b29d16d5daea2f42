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
from pretrain.data.images.decode import BadSample, Encoded, decode
from pretrain.data.shards.reader import ShardSource


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
    assert source.sample(0).texts == {"txt": ["fine"]}


def with_exif(orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(ramp(), "JPEG", exif=exif, **options)


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_what_pillow_goes_by(orientation: int) -> None:
    assert Encoded(with_exif(orientation)).turn == (orientation if 1 <= orientation <= 8 else 1)


def test_orientation_of_other_places() -> None:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    assert Encoded(encoded(ramp(), "JPEG")).turn == 1
    assert Encoded(encoded(ramp(), "JPEG", xmp=packet)).turn == 6
    assert Encoded(encoded(ramp(), "PNG", exif=b"Exif\0\0garbage")).turn == 1
    exif = Image.Exif()
    exif[0x0112] = 8
    assert Encoded(encoded(ramp(), "WEBP", exif=exif)).turn == 8
    assert Encoded(encoded(ramp(), "TIFF", exif=exif)).turn == 8


@pytest.mark.parametrize("size", [(64, 48), (61, 47), (57, 8), (9, 100)])
@pytest.mark.parametrize("eighths", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_scaled_pixels_cover_whole_pixels(size: tuple[int, int], eighths: int, mode: str) -> None:
    """A scaled pixel is near the mean of those it stands for."""
    image = ramp().resize(size, Image.Resampling.BICUBIC).convert(mode)
    data = Encoded(encoded(image, "JPEG", quality=100, subsampling=0))
    assert data.plain_jpeg
    found = data.scaled(eighths)
    assert found is not None
    cell = 8 // eighths
    assert found.shape == (-(-size[1] // cell), -(-size[0] // cell), 3)
    whole = np.asarray(data.image()).astype(float)[: size[1] // cell * cell, : size[0] // cell * cell]
    means = whole.reshape(size[1] // cell, cell, size[0] // cell, cell, 3).mean(axis=(1, 3))
    assert np.abs(found[: size[1] // cell, : size[0] // cell] - means).max() <= (2 if cell > 1 else 0) + 1


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 2}, {"subsampling": 1, "restart_marker_rows": 1}, {"keep_rgb": True}],
    ids=["plain", "progressive", "420", "422-restart", "rgb"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_at_full_size_the_pixels_are_pillows(photos: list[Path], options: dict[str, object], mode: str) -> None:
    for path in photos[:3]:
        data = Encoded(encoded(Image.open(path).convert(mode), "JPEG", **options))
        found = data.scaled(8)
        assert found is not None
        assert np.array_equal(found, np.asarray(data.image()))


@pytest.mark.parametrize("mode", ["CMYK", "RGB"])
def test_what_is_a_plain_jpeg(mode: str) -> None:
    assert Encoded(encoded(ramp(mode), "JPEG")).plain_jpeg == (mode == "RGB")
    assert Encoded(encoded(ramp(), "JPEG", progressive=True)).scaled(8) is not None
    assert not Encoded(encoded(ramp(), "PNG")).plain_jpeg


def test_pillow_decides_on_odd_jpegs(photos: list[Path]) -> None:
    good = photos[0].read_bytes()
    odd = good[:-2] + b"left over" + good[-2:]
    assert Encoded(odd).scaled(8) is None
    assert np.array_equal(np.asarray(Encoded(odd).image()), np.asarray(decode(good)))
    cut = Encoded(good[: len(good) // 2])
    assert cut.scaled(4) is None
    with pytest.raises(BadSample, match="truncated"):
        cut.image()


def test_a_jpeg_of_many_scans_is_refused() -> None:
    """Each scan of no bytes costs a pass over all pixels, so that a small file can keep a worker busy for hours."""
    data = encoded(ramp(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    assert decode(data[:-2] + scan * 20 + b"\xff\xd9").mode == "RGB"
    for use in (decode, Encoded):
        with pytest.raises(BadSample, match=r"scans of .* more than any picture needs"):
            use(data[:-2] + scan * 600 + b"\xff\xd9")


def test_a_baseline_jpeg_of_many_scans_is_refused() -> None:
    """libjpeg walks all pixels for each of them too."""
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG"))
    at, scan = data.index(b"\xff\xc0") + 5, data.index(b"\xff\xda")
    data[at : at + 4] = struct.pack(">HH", 8000, 8000)
    empty = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    for use in (decode, Encoded):
        with pytest.raises(BadSample, match="301 scans of 8000 x 8000"):
            use(bytes(data[:scan]) + empty * 300 + bytes(data[scan:]))


def test_a_large_jpeg_is_refused_though_it_could_be_scaled() -> None:
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 9000, 9000)
    with pytest.raises(BadSample, match="9000 x 9000 pixels"):
        Encoded(bytes(data))
