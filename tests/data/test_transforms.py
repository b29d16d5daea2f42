"""Evaluation and normalisation bit for bit as open_clip does them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.compat import open_clip
from pretrain.data.images.decode import decode
from pretrain.data.images.transforms import ImageSpec, eval_image, normalize

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
