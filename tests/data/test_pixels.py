"""Training pixels: the exact path against open_clip's transform, the fast one against the exact one."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.compat import open_clip
from pretrain.config import Data
from pretrain.data.images.boxes import TURNS, random_cut
from pretrain.data.images.decode import BadSample, Encoded, decode
from pretrain.data.images.pixels import Pixels
from pretrain.data.images.transforms import ImageSpec, normalize
from pretrain.data.order import sample_random

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def spec(size: tuple[int, int] = (224, 224), **options: object) -> ImageSpec:
    return ImageSpec(size, MEAN, STD, **options)  # type: ignore[arg-type]


def knobs(**options: object) -> Data:
    return Data(train=("synthetic:1024",), **options)  # type: ignore[arg-type]


def made(pixels: Pixels, data: bytes, seed: int, size: tuple[int, int] = (224, 224), view: bool = False) -> np.ndarray:
    out = torch.full((3, *size), 77, dtype=torch.uint8)
    (pixels.view if view else pixels.train)(data, sample_random(0, seed), out)
    return out.numpy()


def saved(image: Image.Image, format: str = "JPEG", orientation: int = 1, **options: object) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, format, exif=exif, **options)
    return file.getvalue()


def photo(path: Path, size: tuple[int, int]) -> Image.Image:
    return Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)


def test_exact_pixels_are_open_clips_of_the_same_box(photos: list[Path]) -> None:
    exact = Pixels(spec(), knobs(exact_pixels=True))
    for seed, path in enumerate(photos[:8]):
        data = path.read_bytes()
        cut = random_cut(Encoded(data).size, TURNS[1], (224, 224), (0.9, 1.0), (0.75, 1.3333), sample_random(0, seed))
        theirs = open_clip.image_transform(224, is_train=True, mean=MEAN, std=STD)
        theirs.transforms[0].get_params = lambda *_, box=cut.box: (box[1], box[0], box[3] - box[1], box[2] - box[0])
        found = made(exact, data, seed)
        assert torch.equal(normalize(torch.from_numpy(found)[None], spec())[0], theirs(Image.open(path))), path.name


@pytest.mark.parametrize(
    ("size", "mean", "most"),
    [((1024, 768), 0.8, 40), ((512, 384), 0.02, 1), ((640, 480), 3.0, 110), ((90, 70), 0.1, 2)],
)
def test_fast_pixels_are_near_the_exact_ones(photos: list[Path], size: tuple[int, int], mean: float, most: int) -> None:
    """At full size torch's resizing is at most 2 apart from Pillow's; scaled decoding is another filter."""
    fast, exact = Pixels(spec(), knobs(flip=True)), Pixels(spec(), knobs(flip=True, exact_pixels=True))
    for seed, path in enumerate(photos[:6]):
        data = saved(photo(path, size), quality=90)
        apart = np.abs(made(fast, data, seed).astype(int) - made(exact, data, seed).astype(int))
        assert apart.mean() < mean, path.name
        assert apart.max() <= most, path.name


@pytest.mark.parametrize("orientation", sorted(TURNS))
@pytest.mark.parametrize("side", [56, 504])
@pytest.mark.parametrize("exact", [False, True])
def test_turned_images_come_upright(orientation: int, side: int, exact: bool) -> None:
    """The same picture stored in any of eight ways gives the pixels of Pillow's upright one."""
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}  # where cells begin depends on the edge
    size, data = (32, 40), knobs(**whole if side > 300 else {"crop_scale": (0.3, 0.9)}, exact_pixels=exact)
    coarse = np.random.default_rng(orientation).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    stored = saved(image, orientation=orientation, quality=100, subsampling=0)
    upright = saved(decode(stored), quality=100, subsampling=0)
    for seed in range(6):
        found, expected = (made(Pixels(spec(size), data), file, seed, size).astype(int) for file in (stored, upright))
        assert np.abs(found - expected).mean() < 4, "colours are coded twice"
    assert np.abs(expected - np.ascontiguousarray(expected[:, ::-1])).mean() > 10, "a wrong turn would show"


def test_other_formats_give_the_crops_of_a_jpeg(photos: list[Path]) -> None:
    image = photo(photos[0], (600, 500))
    fast = Pixels(spec(), knobs(crop_scale=(0.4, 1.0), flip=True))
    fine = {"quality": 98, "subsampling": 0}
    files = [saved(image, **fine), saved(image, "PNG"), saved(image, "WEBP", lossless=True),
             saved(image, progressive=True, **fine), saved(image.convert("CMYK"), **fine)]  # fmt: skip
    for seed in range(4):
        first, *others = [made(fast, data, seed).astype(int) for data in files]
        assert all(np.abs(first - other).mean() < 3 for other in others)


def test_damaged_jpegs_are_left_to_pillow_and_draw_nothing_else(photos: list[Path]) -> None:
    good = photos[0].read_bytes()
    odd = good[:-2] + b"left over" + good[-2:]
    small = knobs(crop_scale=(0.95, 1.0), flip=True)
    for data in (small, knobs(crop_scale=(0.95, 1.0), flip=True, exact_pixels=True)):
        pixels = Pixels(spec((300, 300)), data)  # larger than half: nothing is scaled, so that both ways agree
        for seed in range(4):
            assert np.array_equal(made(pixels, odd, seed, (300, 300)), made(pixels, good, seed, (300, 300)))
    out = torch.full((3, 224, 224), 77, dtype=torch.uint8)
    with pytest.raises(BadSample, match="truncated"):
        Pixels(spec(), small).train(good[: len(good) // 2], random.Random(0), out)
    assert (out == 77).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (7, 2000), (8, 8), (9, 3000)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    for format in ("PNG", "JPEG"):
        for size in ((1, 1), (4, 6), (64, 64)):
            for exact in (False, True):
                pixels = Pixels(spec(size), knobs(exact_pixels=exact))
                made(pixels, saved(image, format), 0, size)


def test_flip_mirrors_half_and_only_when_asked() -> None:
    data = saved(Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), "PNG")
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    plain, flipping = Pixels(spec((8, 8)), knobs(**whole)), Pixels(spec((8, 8)), knobs(**whole, flip=True))
    original = np.asarray(decode(data)).transpose(2, 0, 1)
    assert all(np.array_equal(made(plain, data, seed, (8, 8)), original) for seed in range(200))
    found = [made(flipping, data, seed, (8, 8)) for seed in range(200)]
    mirrored = sum(np.array_equal(pixels, original[:, :, ::-1]) for pixels in found)
    assert 70 < mirrored < 130
    assert mirrored + sum(np.array_equal(pixels, original) for pixels in found) == 200


def test_pixels_are_a_function_of_bytes_and_randomness(photos: list[Path]) -> None:
    data = photos[0].read_bytes()
    options = {"crop_scale": (0.3, 1.0), "flip": True}
    pixels = Pixels(spec((48, 64)), knobs(**options, augment=("color_jitter=0.4", "blur=0.5", "erase=0.5")))
    first = [made(pixels, data, seed, (48, 64)) for seed in range(6)]
    assert all(np.array_equal(a, made(pixels, data, seed, (48, 64))) for seed, a in enumerate(first))
    assert len({a.tobytes() for a in first}) == 6
    bare = Pixels(spec((48, 64)), knobs(**options, view_augment=("solarize=1",)))
    trained, seen = made(bare, data, 0, (48, 64)).astype(int), made(bare, data, 0, (48, 64), view=True).astype(int)
    assert np.array_equal(seen, np.where(trained < 128, trained, 255 - trained)), "the same draw, then its own edits"


def test_pixels_land_in_a_row_of_a_batch(photos: list[Path]) -> None:
    batch = torch.full((3, 3, 32, 32), 77, dtype=torch.uint8)
    Pixels(spec((32, 32)), knobs()).train(photos[0].read_bytes(), sample_random(0, 0), batch[1])
    assert (batch[[0, 2]] == 77).all()
    assert np.array_equal(batch[1].numpy(), made(Pixels(spec((32, 32)), knobs()), photos[0].read_bytes(), 0, (32, 32)))


DIGEST = """
import sys, hashlib, torch
from pretrain.config import Data
from pretrain.data.order import sample_random
from pretrain.data.images.pixels import Pixels
from pretrain.data.images.transforms import ImageSpec
torch.set_num_threads(int(sys.argv[1]))
pixels = Pixels(ImageSpec((224, 224), (.5, .5, .5), (.5, .5, .5)), Data(train=("synthetic:1024",), flip=True,
                augment=("color_jitter=0.4", "blur=0.5")))
digest, out = hashlib.sha256(), torch.empty(3, 224, 224, dtype=torch.uint8)
for seed, path in enumerate(sys.argv[2:]):
    pixels.train(open(path, "rb").read(), sample_random(0, seed), out)
    digest.update(out.numpy().tobytes())
print(digest.hexdigest(), torch.get_num_threads())
"""


@pytest.mark.slow
def test_neither_threads_nor_vector_instructions_show(photos: list[Path], tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    large.write_bytes(saved(photo(photos[0], (1600, 1200)), quality=90))
    paths = [*map(str, photos[:6]), str(large)]
    found = set()
    for threads, capability in (("1", "default"), ("1", "avx2"), ("2", "avx2")):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", DIGEST, threads, *paths]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digest, kept = done.stdout.split()
        assert kept == threads, "Pixels leaves the process's number of threads alone"
        found.add(digest)
    assert len(found) == 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damage_gives_pixels_or_a_reason_and_always_the_same(format: str) -> None:
    """Bytes changed, cut off, or put in, anywhere in a file."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    good = saved(Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC), format, orientation=6)
    pixels, rng, outcomes = Pixels(spec((32, 32)), knobs()), random.Random(0), []
    for trial in range(200):
        bad, at = bytearray(good), int(rng.random() * len(good))
        piece = bytes(int(rng.random() * 256) for _ in range(4))
        bad[at : [at + 4, len(bad), at][trial % 3]] = [piece, b"", piece][trial % 3]

        def outcome(data: bytes = bytes(bad)) -> str:
            try:
                return str(made(pixels, data, 0, (32, 32)).sum())
            except BadSample as reason:
                return str(reason)

        outcomes.append(outcome())
        assert outcome() == outcomes[-1]
        assert "\n" not in outcomes[-1]
    reasons = sum(not found.isdigit() for found in outcomes)
    assert 20 < reasons <= 200
