"""Evaluation and normalisation bit for bit as open_clip does them; the training crop by its own rules."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.compat import open_clip
from pretrain.config import Data
from pretrain.data.decode import decode
from pretrain.data.order import sample_random
from pretrain.data.transforms import ImageSpec, eval_image, normalize, random_box, train_image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def spec(size: tuple[int, int] = (224, 224), **options: object) -> ImageSpec:
    return ImageSpec(size, MEAN, STD, **options)  # type: ignore[arg-type]


def theirs(image: Image.Image, our: ImageSpec) -> tuple[np.ndarray, torch.Tensor]:
    """open_clip's pixels before ToTensor, and what comes out at the end."""
    size = our.size[0] if our.size[0] == our.size[1] else our.size
    transform = open_clip.image_transform(
        size, is_train=False, mean=our.mean, std=our.std, resize_mode=our.resize_mode,
        interpolation=our.interpolation, fill_color=our.fill_color,
    )  # fmt: skip
    pixels = image
    for step in transform.transforms[:-2]:
        pixels = step(pixels)
    return np.asarray(pixels).transpose(2, 0, 1), transform(image)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
def test_evaluation_equals_open_clip(photos: list[Path], mode: str, interpolation: str, size: tuple[int, int]) -> None:
    our = spec(size, resize_mode=mode, interpolation=interpolation, fill_color=7)
    for path in photos[:6]:
        image = decode(path.read_bytes())
        pixels, normalized = theirs(image, our)
        found = eval_image(image, our)
        assert found.dtype == np.uint8
        assert np.array_equal(found, pixels), path.name
        assert torch.equal(normalize(torch.from_numpy(found)[None], our)[0], normalized), path.name


def test_evaluation_equals_open_clip_for_odd_shapes() -> None:
    shapes = [(1, 1), (1, 50), (50, 1), (31, 33), (32, 32), (300, 17), (33, 32), (32, 47)]
    for (width, height), mode, size in itertools.product(
        shapes, ["shortest", "longest", "squash"], [(32, 32), (30, 40)]
    ):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, our = Image.fromarray(pixels), spec(size, resize_mode=mode)
        assert np.array_equal(eval_image(image, our), theirs(image, our)[0]), (width, height, mode, size)


def test_unknown_resize_mode() -> None:
    with pytest.raises(ValueError, match="resize_mode 'fit'"):
        eval_image(Image.new("RGB", (4, 4)), spec(resize_mode="fit"))


def test_every_pixel_value_normalises_as_open_clip_does() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    tensors = values[0].float() / 255
    expected = (tensors - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    found = normalize(values, spec())
    assert found.dtype == torch.float32
    assert torch.equal(found[0], expected)
    assert values.max() == 255, "the input is left alone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_normalise_is_the_same_on_a_gpu() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(normalize(values.cuda(), spec()).cpu(), normalize(values, spec()))


def test_boxes_obey_scale_and_ratio_and_reach_everywhere() -> None:
    width, height, corners = 400, 300, []
    for position in range(400):
        left, top, right, bottom = random_box((width, height), (0.2, 0.6), (0.5, 2.0), sample_random(0, position))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        share, shape = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
        assert 0.19 < share < 0.61
        assert 0.48 < shape < 2.06
        corners.append((left, top, right, bottom, share, math.log(shape)))
    columns = np.array(corners, dtype=float)
    assert columns[:, 0].min() < 8
    assert columns[:, 1].min() < 8
    assert columns[:, 2].max() > width - 8
    assert columns[:, 3].max() > height - 8
    assert abs(columns[:, 4].mean() - 0.4) < 0.03
    assert abs(columns[:, 5].mean()) < 0.08


def test_impossible_shapes_fall_back_to_the_centre() -> None:
    assert random_box((1000, 10), (0.9, 1.0), (0.75, 4 / 3), sample_random(0, 0)) == (493, 0, 506, 10)
    assert random_box((1, 1), (0.9, 1.0), (0.75, 4 / 3), sample_random(0, 0)) == (0, 0, 1, 1)


def test_training_image_is_a_function_of_its_randomness(photos: list[Path]) -> None:
    image, our = decode(photos[0].read_bytes()), spec((48, 64))
    data = Data(crop_scale=(0.3, 1.0), flip=True)
    first = [train_image(image, our, data, sample_random(0, p)) for p in range(6)]
    again = [train_image(image, our, data, sample_random(0, p)) for p in range(6)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({a.tobytes() for a in first}) == 6
    assert (first[0].shape, first[0].dtype) == ((3, 48, 64), np.uint8)


def test_flip_mirrors_half_and_only_when_asked() -> None:
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    plain = [train_image(image, spec((8, 8)), Data(**whole), sample_random(0, p)) for p in range(200)]
    flipped = [train_image(image, spec((8, 8)), Data(**whole, flip=True), sample_random(0, p)) for p in range(200)]
    original = np.asarray(image).transpose(2, 0, 1)
    assert all(np.array_equal(a, original) for a in plain)
    mirrored = sum(np.array_equal(a, original[:, :, ::-1]) for a in flipped)
    assert 70 < mirrored < 130
    assert mirrored + sum(np.array_equal(a, original) for a in flipped) == 200


def test_crop_and_resize_equal_torchvision(photos: list[Path]) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    image, data = decode(photos[1].read_bytes()), Data(crop_scale=(0.2, 0.5))
    left, top, right, bottom = random_box(image.size, data.crop_scale, data.crop_ratio, sample_random(3, 4))
    expected = resized_crop(image, top, left, bottom - top, right - left, [32, 40], InterpolationMode.BICUBIC)
    found = train_image(image, spec((32, 40)), data, sample_random(3, 4))
    assert np.array_equal(found, np.asarray(expected).transpose(2, 0, 1))
