"""Every form bit for bit what ToTensor and Normalize give, in every layout and dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.kernels.normalize_images import blockwise, normalize_images

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMS = ["reference", "blockwise", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.channels_last, torch.contiguous_format]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHAPES = [(1, 1, 1), (2, 16, 16), (3, 33, 17), (5, 1, 50), (2, 64, 40)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two small images, or of one that is larger than a block."""
    monkeypatch.setattr(blockwise, "CPU_PIXELS", 3500)


def random(count: int, height: int, width: int, layout: str) -> Tensor:
    shape = (count, 3, height, width) if layout == "nchw" else (count, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def expected(images: Tensor, layout: str) -> Tensor:
    """torchvision's own operations, on the CPU."""
    pixels = (images if layout == "nchw" else images.permute(0, 3, 1, 2)).cpu().contiguous()
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_and_layout(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str, memory_format: torch.memory_format, form: str
) -> None:
    if form == "triton" and dtype == torch.bfloat16 and not CUDA:
        pytest.skip("triton's interpreter cuts bf16 off instead of rounding")
    images = random(*shape, layout)
    found = normalize_images(images, MEAN, STD, layout=layout, dtype=dtype, memory_format=memory_format, impl=form)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.equal(found.cpu(), expected(images, layout).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_every_value_of_every_channel(form: str) -> None:
    values = torch.arange(256, dtype=torch.uint8, device=DEVICE).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(normalize_images(values, MEAN, STD, impl=form).cpu(), expected(values, "nchw"))
    assert values.max() == 255, "the input is left alone"


@pytest.mark.parametrize("form", FORMS)
def test_strides_of_the_input_do_not_matter(form: str) -> None:
    whole = random(4, 20, 12, "nchw")
    for view in (whole.contiguous(memory_format=torch.channels_last), whole[::2, :, 3:15, ::3], whole.flip(1)):
        assert torch.equal(normalize_images(view, MEAN, STD, impl=form).cpu(), expected(view, "nchw"))


@pytest.mark.parametrize("form", FORMS)
def test_no_images(form: str) -> None:
    assert normalize_images(random(0, 8, 8, "nchw"), MEAN, STD, impl=form).shape == (0, 3, 8, 8)
    assert normalize_images(random(2, 0, 8, "nhwc"), MEAN, STD, layout="nhwc", impl=form).shape == (2, 3, 0, 8)


IMAGES = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: normalize_images(IMAGES.float(), MEAN, STD), r"\[2, 3, 4, 5\] torch.float32 must be \[B, 3, H, W\]"),
        (lambda: normalize_images(IMAGES[0], MEAN, STD), r"\[3, 4, 5\] torch.uint8 must be \[B, 3, H, W\]"),
        (lambda: normalize_images(IMAGES, MEAN, STD, layout="nhwc"), r"\[2, 3, 4, 5\].* must be \[B, H, W, 3\]"),
        (lambda: normalize_images(IMAGES, MEAN, STD, layout="chw"), "layout 'chw' must be one of nchw, nhwc"),  # type: ignore[arg-type]
        (lambda: normalize_images(IMAGES, MEAN[:1], STD), r"mean \(0.48145466,\)"),
        (lambda: normalize_images(IMAGES, MEAN, (1.0, 0.0, 1.0)), r"std \(1.0, 0.0, 1.0\) must .* no std 0"),
        (lambda: normalize_images(IMAGES, MEAN, STD, dtype=torch.float64), "dtype torch.float64"),
        (
            lambda: normalize_images(IMAGES, MEAN, STD, memory_format=torch.preserve_format),
            "memory_format torch.preserve_format",
        ),
        (lambda: normalize_images(IMAGES, MEAN, STD, impl="fast"), "impl 'fast' must be one of"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_on_a_gpu_nothing_but_the_result_is_allocated(layout: str) -> None:
    images = random(64, 224, 224, layout)
    normalize_images(images, MEAN, STD, layout=layout, dtype=torch.bfloat16, impl="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = normalize_images(images, MEAN, STD, layout=layout, dtype=torch.bfloat16, impl="triton")
    assert torch.cuda.max_memory_allocated() - before <= found.numel() * 2 + 512
    assert torch.equal(found.cpu(), expected(images, layout).bfloat16())
