"""The Triton form, interpreted where there is no GPU: its error is at most twice an independent reference's."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from pretrain.kernels import launches, strips
from pretrain.kernels.pairing import Pairing, Span
from pretrain.kernels.sigmoid_contrastive import reference, sigmoid_contrastive
from pretrain.kernels.softmax_contrastive.reference import masks

kernel = pytest.importorskip("pretrain.kernels.sigmoid_contrastive.kernel")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOATS = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
SHAPES = [(1, 1, 1), (5, 17, 3), (33, 70, 48)]
KINDS = ["negatives", "ignore", "positives"]


@pytest.fixture
def many_launches(monkeypatch):
    monkeypatch.setattr(launches, "ROWS", 64)
    monkeypatch.setattr(launches, "PARTS", 300)
    monkeypatch.setattr(strips, "EDGE", 128)
    monkeypatch.setattr(strips, "BYTES", 2 * 128 * 64)


def features(rows, columns, width, dtype, scale=10.0, bias=-10.0):
    made = [normalize(torch.randn(n, width, dtype=torch.float64), dim=1).to(DEVICE, dtype) for n in (rows, columns)]
    return *made, torch.tensor(scale, device=DEVICE), torch.tensor(bias, device=DEVICE)


def pairing_of(rows, columns, offset, kind):
    if kind == "negatives":
        return Pairing(Span.at(offset, rows, columns))
    ids = [torch.randint(-3, 4, (n,), device=DEVICE) for n in (rows, columns)]
    return Pairing(Span.at(offset, rows, columns), kind, *ids)


def swept(form, inputs, pairing, start, **options):
    d_rows = start.clone()
    found = form.sweep(*inputs, pairing, d_rows, True, True, **options)
    return [found.total, found.bias, d_rows, found.columns]


def low_sweep(inputs, pairing, start, dtype):
    """The reference, with logit gradients rounded to dtype once, and products of them in fp32."""
    rows, columns, scale, bias = inputs
    total, d_bias, *_ = swept(reference, inputs, pairing, start)
    logits = scale * (rows.float() @ columns.float().T) + bias
    positive, left_out = masks(logits, pairing)
    gradient = torch.where(positive, -torch.sigmoid(-logits), torch.sigmoid(logits)).masked_fill(left_out, 0)
    power = 2.0**14 if dtype == torch.float16 else 1.0
    low = (gradient * power).to(dtype).float() / power
    return [total, d_bias, start + low @ columns.to(dtype).float(), low.T @ rows.to(dtype).float()], gradient


def check_sweep(inputs, pairing, check, dtype, **options):
    start = torch.randn(inputs[0].shape, device=DEVICE)
    exact = swept(reference, [x.double() for x in inputs], pairing, start.double())
    low, gradient = low_sweep(inputs, pairing, start, dtype)
    # what the bias's gradient sums up; and an exponential is rounded as its exponent is, which is at most 20
    terms = [20 * exact[0], gradient.double(), None, None]
    for one, two, three, summed in zip(
        swept(kernel, inputs, pairing, start, **options), low, exact, terms, strict=True
    ):
        check(one, two, three, summed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sweep(shape, dtype, kind, many_launches, within_twice):
    rows, columns, _ = shape
    pairing = pairing_of(rows, columns, (columns - rows) // 2, kind)
    check_sweep(features(*shape, dtype), pairing, within_twice, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_and_columns_than_a_launch_has(kind, many_launches, within_twice):
    inputs, pairing = features(130, 257, 40, FLOATS[-1]), pairing_of(130, 257, 63, kind)
    check_sweep(inputs, pairing, within_twice, FLOATS[-1])


@pytest.mark.parametrize("offset", [0, 3, -2, 40, -40, 35, -25, 100])
def test_partners_may_lie_anywhere_or_nowhere(offset, within_twice):
    inputs, pairing = features(40, 70, 8, torch.float32), pairing_of(40, 70, offset, "negatives")
    check_sweep(inputs, pairing, within_twice, torch.float32)


def test_gradients_may_be_multiplied_in_another_dtype(within_twice):
    inputs, pairing = features(40, 70, 24, torch.float32), pairing_of(40, 70, 3, "negatives")
    check_sweep(inputs, pairing, within_twice, torch.float16, gradient_dtype=torch.float16)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_total_is_the_same(kind, many_launches):
    inputs, pairing = features(70, 40, 24, torch.float32), pairing_of(70, 40, -3, kind)
    whole = kernel.sweep(*inputs, pairing, torch.zeros(70, 24, device=DEVICE), True, True)
    alone = kernel.sweep(*inputs, pairing, None, False, False)
    bias_only = kernel.sweep(*inputs, pairing, None, False, True)
    assert alone.bias is None
    assert alone.columns is None
    torch.testing.assert_close(alone.total, whole.total)
    torch.testing.assert_close(bias_only.bias, whole.bias)


@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (0, 0, 4)], ids=str)
def test_nothing_gives_zeros(shape):
    rows, columns, width = shape
    inputs, pairing = features(*shape, torch.float32), Pairing(Span.at(0, rows, columns))
    for d_rows in (None, torch.zeros(rows, width, device=DEVICE)):
        found = kernel.sweep(*inputs, pairing, d_rows, True, True)
        assert (found.total, found.bias) == (0, 0)
        assert torch.equal(found.columns, torch.zeros_like(inputs[1]))


log1p = kernel.log1p


@triton.jit
def _log1p(values, found, SIZE: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(found + at, log1p(tl.load(values + at)))


def test_log1p_is_right_to_the_last_bits():
    values = torch.cat([torch.logspace(-38, 0, 3072), torch.linspace(0, 1, 1024)]).to(DEVICE)
    found = torch.empty_like(values)
    _log1p[(4,)](values, found, 1024)
    error = (found.double() - values.double().log1p()).abs() / values.double().log1p().clamp(min=1e-300)
    assert error[values > 0].max() <= 1.5e-7
    assert not found[values == 0].any()


@pytest.mark.parametrize("logit", [-30.0, -20.0, -10.0, -1.0, 0.0, 1.0, 10.0, 60.0])
def test_small_losses_keep_their_bits(logit, within_twice):
    """A pair whose loss is e^-30 counts as much as torch's own arithmetic makes it count."""
    line = torch.zeros(16, 4, device=DEVICE)
    line[:, 0] = 1
    inputs = [line, line, torch.tensor(logit / 2, device=DEVICE), torch.tensor(logit / 2, device=DEVICE)]
    pairing = Pairing(Span(0, 0, 0))
    total = kernel.sweep(*inputs, pairing, None, False, False).total
    wanted = 256 * (math.log1p(math.exp(-abs(logit))) + max(logit, 0))
    assert abs(float(total) - wanted) <= 4 * torch.finfo(torch.float32).eps * max(1, abs(logit)) * wanted


def with_gradients(inputs, impl, offset=0, **ids):
    leaves = [x.clone().requires_grad_() for x in inputs]
    total = sigmoid_contrastive(*leaves, offset, impl=impl, **ids)
    return [total.detach(), *torch.autograd.grad(total * 0.25, leaves)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients(kind, within_twice):
    inputs = features(40, 70, 12, torch.float32, bias=-4.0)
    column_ids = torch.randint(0, 9, (70,), device=DEVICE)
    ids = {"duplicates": kind, "row_ids": column_ids[5:45].clone(), "column_ids": column_ids}
    exact = with_gradients([x.double() for x in inputs], "reference", 5, **ids)
    low, found = (with_gradients(inputs, impl, 5, **ids) for impl in ("reference", "triton"))
    terms = [None] * 3 + [inputs[0].double() * exact[1] / inputs[2], exact[0]]  # what scale's and bias's sum up
    for one, two, three, summed in zip(found, low, exact, terms, strict=True):
        within_twice(one, two, three, summed)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 300.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_keep_their_last_bits(sign, bias, within_twice):
    """Every pair perfect or perfectly wrong at a scale of 200, where softplus(z) - z would return rounding noise."""
    images = features(16, 16, 8, torch.float32)[0]
    inputs = [images, sign * images, *(torch.tensor(x, device=DEVICE) for x in (200.0, bias))]
    exact = with_gradients([x.double() for x in inputs], "reference")
    low, found = (with_gradients(inputs, impl) for impl in ("reference", "triton"))
    for one, two, three in zip(found, low, exact, strict=True):
        assert one.isfinite().all()
        within_twice(one, two, three)


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1000, 3001, 513), (4096, 4096, 512), (777, 20000, 768), (2050, 2050, 1152)], ids=str
)
def test_larger_shapes_on_a_gpu(shape, dtype, within_twice):
    rows, columns, _ = shape
    pairing = pairing_of(rows, columns, (columns - rows) // 2, "negatives")
    check_sweep(features(*shape, dtype), pairing, within_twice, dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_runs_on_a_gpu_give_the_same_bits(dtype):
    inputs = features(5000, 5000, 512, dtype)
    one, two = (with_gradients(inputs, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@gpu
def test_memory_on_a_gpu_is_bounded():
    """12 bytes a feature: both gradients in fp32 and rounded; and a strip, scratch and a library's workspace."""
    rows, width = 16384, 512
    leaves = [x.requires_grad_() for x in features(rows, rows, width, torch.bfloat16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sigmoid_contrastive(*leaves, impl="triton").backward()
    assert torch.cuda.max_memory_allocated() - before <= 12 * rows * width + 0.25e9


@gpu
@pytest.mark.parametrize("rows", [16384, 65536])
def test_as_blockwise_at_a_size_that_matters(rows):
    inputs = features(rows, rows, 512, torch.bfloat16)
    found, wanted = (with_gradients(inputs, impl) for impl in ("triton", "blockwise"))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    for mine, torchs in zip(found[1:3], wanted[1:3], strict=True):
        mine, torchs = mine.float(), torchs.float()
        assert (mine - torchs).norm() <= 8e-3 * torchs.norm()  # a strip and a gradient, each rounded to bf16 once
