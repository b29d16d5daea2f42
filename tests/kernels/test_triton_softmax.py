"""The Triton form, interpreted where there is no GPU: its error is at most twice an independent reference's."""

import os

import pytest
import torch
from torch.nn.functional import normalize

from pretrain.kernels import launches, strips
from pretrain.kernels.pairing import Pairing, Span
from pretrain.kernels.softmax_contrastive import reference, softmax_contrastive
from pretrain.kernels.softmax_contrastive.statistics import Shifts, Weights

kernel = pytest.importorskip("pretrain.kernels.softmax_contrastive.kernel")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOATS = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
SHAPES = [(1, 1, 1), (5, 17, 3), (33, 70, 48)]
KINDS = ["negatives", "ignore", "positives"]


@pytest.fixture
def many_launches(monkeypatch):
    """What a GPU does for a million rows, at a hundred."""
    monkeypatch.setattr(launches, "ROWS", 64)
    monkeypatch.setattr(launches, "PARTS", 300)
    monkeypatch.setattr(strips, "EDGE", 128)
    monkeypatch.setattr(strips, "BYTES", 2 * 128 * 64)


def features(rows, columns, width, dtype, scale=7.5):
    made = [normalize(torch.randn(n, width, dtype=torch.float64), dim=1).to(DEVICE, dtype) for n in (rows, columns)]
    return *made, torch.tensor(scale, device=DEVICE)


def pairing_of(rows, columns, offset, kind):
    if kind == "negatives":
        return Pairing(Span.at(offset, rows, columns))
    ids = [torch.randint(-3, 4, (n,), device=DEVICE) for n in (rows, columns)]
    return Pairing(Span.at(offset, rows, columns), kind, *ids)


def shifts_of(inputs, pairing, tracked):
    """A common shift; or maxima as the reference finds them, rounded, so that they suit every precision."""
    if not tracked:
        return Shifts(torch.tensor(1.25, device=DEVICE), None)
    found = reference.maxima(*inputs, pairing)
    return Shifts(*(x.nan_to_num(neginf=0).round() for x in found))


def weights_of(rows, columns, kind, sums):
    """As a loss makes them of upstream gradients, so that `largest` holds."""
    half_row, half_column = torch.rand(rows, device=DEVICE), torch.rand(columns, device=DEVICE)
    extra = half_column / 3 if kind == "positives" else None
    by_row, by_column = half_row / sums.rows, half_column / sums.columns
    finite = [x.nan_to_num(posinf=0, nan=0) for x in (by_row, by_column)]
    return Weights(*finite, 2 * half_row if extra is None else half_row / 3, extra, torch.ones((), device=DEVICE))


def wide(item):
    return type(item)(*(None if x is None else x.double() for x in item)) if isinstance(item, tuple) else item.double()


def checked(check, found, low, exact, exponent=None):
    """An exponential is rounded as its exponent is, which has that size."""
    for one, two, three in zip(found, low, exact, strict=True):
        assert (one is None) == (three is None)
        if one is not None:
            check(one, two, three, None if exponent is None else three.abs().max() * exponent)


EXPONENT = 7.5 + 1.25
"""The largest that scale and common shift below make."""


def in_base_2(inputs, shifts, pairing):
    """Exponentials for row and for column sums, as powers of 2, which is what GPUs have: rounded once more."""
    cosines, log2e = inputs[0].float() @ inputs[1].float().T, 1.4426950408889634
    left_out = reference.masks(cosines, pairing)[1]
    if shifts.column is None:
        return ((cosines * (inputs[2] * log2e) - shifts.row * log2e).exp2().masked_fill(left_out, 0),) * 2
    shifted = inputs[2] * cosines - shifts.row[:, None], inputs[2] * cosines - shifts.column
    return tuple((x * log2e).exp2().masked_fill(left_out, 0) for x in shifted)


def low_sums(inputs, shifts, pairing):
    by_row, by_column = in_base_2(inputs, shifts, pairing)
    return reference.sums(*inputs, shifts, pairing)._replace(rows=by_row.sum(1), columns=by_column.sum(0))


def low_gradients(inputs, shifts, pairing, weights, start, dtype):
    """Logit gradients rounded to dtype once, and products of them in fp32."""
    by_row, by_column = in_base_2(inputs, shifts, pairing)
    extra = 0 if weights.column_positive is None else weights.column_positive
    gradient = by_row * weights.row[:, None] + by_column * weights.column
    gradient -= torch.where(reference.masks(gradient, pairing)[0], weights.positive[:, None] + extra, 0)
    power = 2.0 ** (12 - gradient.abs().max().log2().floor()) if dtype == torch.float16 else 1.0
    low = (gradient * power).to(dtype).float() / power
    return start + low @ inputs[1].to(dtype).float(), low.T @ inputs[0].to(dtype).float()


@pytest.mark.parametrize("tracked", [False, True], ids=["one shift", "tracked"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_maxima(shape, dtype, kind, tracked, many_launches, within_twice):
    rows, columns, _ = shape
    inputs, pairing = features(*shape, dtype), pairing_of(rows, columns, (columns - rows) // 2, kind)
    shifts = shifts_of(inputs, pairing, tracked)
    exact = reference.sums(*map(wide, inputs), wide(shifts), pairing)
    checked(within_twice, kernel.sums(*inputs, shifts, pairing), low_sums(inputs, shifts, pairing), exact, EXPONENT)
    exact, low = reference.maxima(*map(wide, inputs), pairing), reference.maxima(*inputs, pairing)
    found = kernel.maxima(*inputs, pairing)
    for one, two, three in zip(found, low, exact, strict=True):
        assert torch.equal(one.isinf(), three.isinf())
        kept = ~three.isinf()
        if kept.any():
            within_twice(one[kept], two[kept], three[kept])


@pytest.mark.parametrize("tracked", [False, True], ids=["one shift", "tracked"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, dtype, kind, tracked, many_launches, within_twice):
    rows, columns, width = shape
    inputs, pairing = features(*shape, dtype), pairing_of(rows, columns, (columns - rows) // 2, kind)
    shifts = shifts_of(inputs, pairing, tracked)
    weights = weights_of(rows, columns, kind, reference.sums(*inputs, shifts, pairing))
    start = torch.randn(rows, width, device=DEVICE)
    exact, found = start.double(), start.clone()
    exact_columns = reference.gradients(*map(wide, inputs), wide(shifts), pairing, wide(weights), exact, True)
    low, low_columns = low_gradients(inputs, shifts, pairing, weights, start, dtype)
    found_columns = kernel.gradients(*inputs, shifts, pairing, weights, found, True)
    checked(within_twice, (found, found_columns), (low, low_columns), (exact, exact_columns))


@pytest.mark.parametrize(("kind", "tracked"), [("negatives", False), ("ignore", True), ("positives", False)])
def test_more_rows_and_columns_than_a_launch_has(kind, tracked, many_launches, within_twice):
    shape = (130, 257, 40)
    test_sums_and_maxima(shape, FLOATS[-1], kind, tracked, many_launches, within_twice)
    test_gradients(shape, FLOATS[-1], kind, tracked, many_launches, within_twice)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_fp16_gradients_are_as_precise_at_every_size(factor):
    inputs, pairing = features(40, 40, 16, torch.float16), pairing_of(40, 40, 0, "negatives")
    shifts = shifts_of(inputs, pairing, False)
    weights = weights_of(40, 40, "negatives", reference.sums(*inputs, shifts, pairing))
    scaled = Weights(*(None if x is None else x * factor for x in weights))
    found, wanted = (kernel.gradients(*inputs, shifts, pairing, w, None, True) for w in (scaled, weights))
    torch.testing.assert_close(found / factor, wanted, rtol=0, atol=2**-10 * float(wanted.abs().max()))


def test_gradients_may_be_multiplied_in_another_dtype(within_twice):
    inputs, pairing = features(40, 70, 24, torch.float32), pairing_of(40, 70, 3, "negatives")
    shifts = shifts_of(inputs, pairing, False)
    weights = weights_of(40, 70, "negatives", reference.sums(*inputs, shifts, pairing))
    exact, found = torch.zeros(40, 24, dtype=torch.float64, device=DEVICE), torch.zeros(40, 24, device=DEVICE)
    exact_columns = reference.gradients(*map(wide, inputs), wide(shifts), pairing, wide(weights), exact, True)
    low = low_gradients(inputs, shifts, pairing, weights, torch.zeros(40, 24, device=DEVICE), torch.float16)
    columns = kernel.gradients(*inputs, shifts, pairing, weights, found, True, torch.float16)
    checked(within_twice, (found, columns), low, (exact, exact_columns))
    full = kernel.gradients(*inputs, shifts, pairing, weights, None, True)
    assert not torch.equal(full, columns)


@pytest.mark.parametrize("offset", [0, 3, -2, 40, -40, 35, -25, 100])
def test_partners_may_lie_anywhere_or_nowhere(offset, within_twice):
    inputs, pairing = features(40, 70, 8, torch.float32), pairing_of(40, 70, offset, "negatives")
    shifts = shifts_of(inputs, pairing, False)
    exact = reference.sums(*map(wide, inputs), wide(shifts), pairing)
    checked(within_twice, kernel.sums(*inputs, shifts, pairing), low_sums(inputs, shifts, pairing), exact, EXPONENT)


@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (0, 0, 4)], ids=str)
def test_nothing_gives_zeros(shape):
    rows, columns, _ = shape
    inputs, pairing = features(*shape, torch.float32), Pairing(Span.at(0, rows, columns))
    shifts, none = shifts_of(inputs, pairing, False), torch.zeros((), device=DEVICE)
    found = kernel.sums(*inputs, shifts, pairing)
    assert [len(x) for x in found[:3]] == [rows, columns, rows]
    assert not any(x.any() for x in found[:3])
    weights = Weights(torch.ones(rows, device=DEVICE), torch.ones(columns, device=DEVICE), found.rows, None, none)
    assert torch.equal(kernel.gradients(*inputs, shifts, pairing, weights, None, True), torch.zeros_like(inputs[1]))
    assert all(x.isneginf().all() for x in kernel.maxima(*inputs, pairing))


def with_gradients(inputs, upstream, impl, offset=0, **ids):
    leaves = [x.clone().requires_grad_() for x in inputs]
    losses = softmax_contrastive(*leaves, None, offset, impl=impl, **ids)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, upstream.to(losses.dtype))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients(kind, within_twice):
    inputs, upstream = features(40, 70, 12, torch.float32), torch.rand(40, device=DEVICE)
    column_ids = torch.randint(0, 9, (70,), device=DEVICE)
    ids = {"duplicates": kind, "row_ids": column_ids[5:45].clone(), "column_ids": column_ids}
    exact = with_gradients([x.double() for x in inputs], upstream, "reference", 5, **ids)
    low, found = (with_gradients(inputs, upstream, impl, 5, **ids) for impl in ("reference", "triton"))
    terms = [None] * 3 + [inputs[0].double() * exact[1] / inputs[2]]  # what the scale's gradient sums up
    for one, two, three, summed in zip(found, low, exact, terms, strict=True):
        within_twice(one, two, three, summed)


@pytest.mark.parametrize("case", ["converged", "opposite", "all at 1", "all at -1", "rows at -1"])
@pytest.mark.parametrize("scale", [50.0, 200.0])
def test_extreme_scales_and_cosines_are_finite_and_right(case, scale):
    """A converged batch's loss keeps its last bits; sums that one shift cannot hold get shifts of their own."""
    one, line = normalize(torch.randn(40, 8), dim=1), normalize(torch.randn(1, 8), dim=1).repeat(40, 1)
    mixed = torch.cat([-line[:3], line[3:]])
    cases = {"converged": (one, one), "opposite": (one, -one), "all at 1": (line, line), "all at -1": (line, -line)}
    given = (*(cases | {"rows at -1": (mixed, line)})[case], torch.tensor(scale))
    inputs, upstream = [x.to(DEVICE) for x in given], torch.full((40,), 1 / 40, device=DEVICE)
    exact = with_gradients([x.double() for x in inputs], upstream, "reference")
    low, found = (with_gradients(inputs, upstream, impl) for impl in ("blockwise", "triton"))
    rounding = torch.finfo(torch.float32).eps * scale
    for mine, torchs, wanted in zip(found, low, exact, strict=True):
        assert mine.isfinite().all()
        assert (mine - wanted).abs().max() <= 2 * (torchs - wanted).abs().max() + 4 * rounding * scale
    if case == "converged":
        torch.testing.assert_close(found[0], low[0], rtol=1e-4, atol=4 * torch.finfo(torch.float32).eps)


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("tracked", [False, True], ids=["one shift", "tracked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1000, 3001, 513), (4096, 4096, 512), (777, 20000, 768), (2050, 2050, 1152)], ids=str
)
def test_larger_shapes_on_a_gpu(shape, dtype, tracked, within_twice):
    rows, columns, width = shape
    inputs, pairing = features(*shape, dtype, 30.0), pairing_of(rows, columns, (columns - rows) // 2, "negatives")
    shifts = shifts_of(inputs, pairing, tracked)
    exact, low = reference.sums(*map(wide, inputs), wide(shifts), pairing), low_sums(inputs, shifts, pairing)
    checked(within_twice, kernel.sums(*inputs, shifts, pairing), low, exact, 30 + 1.25)
    weights = weights_of(rows, columns, "negatives", low)
    exact, found = torch.zeros(rows, width, dtype=torch.float64, device=DEVICE), torch.zeros(rows, width, device=DEVICE)
    exact_columns = reference.gradients(*map(wide, inputs), wide(shifts), pairing, wide(weights), exact, True)
    low, low_columns = low_gradients(inputs, shifts, pairing, weights, torch.zeros_like(found), dtype)
    found_columns = kernel.gradients(*inputs, shifts, pairing, weights, found, True)
    checked(within_twice, (found, found_columns), (low, low_columns), (exact, exact_columns))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_runs_on_a_gpu_give_the_same_bits(dtype):
    inputs, upstream = features(5000, 5000, 512, dtype, 50.0), torch.full((5000,), 1 / 5000, device=DEVICE)
    one, two = (with_gradients(inputs, upstream, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@gpu
def test_memory_on_a_gpu_is_bounded():
    """12 bytes a feature: both gradients in fp32 and rounded; and a strip, scratch and a library's workspace."""
    rows, width = 16384, 512
    leaves = [x.requires_grad_() for x in features(rows, rows, width, torch.bfloat16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    softmax_contrastive(*leaves, impl="triton").mean().backward()
    assert torch.cuda.max_memory_allocated() - before <= 12 * rows * width + 0.25e9


@gpu
@pytest.mark.parametrize("rows", [16384, 65536])
def test_as_blockwise_at_a_size_that_matters(rows):
    inputs, upstream = features(rows, rows, 512, torch.bfloat16, 100.0), torch.full((rows,), 1 / rows, device=DEVICE)
    found, wanted = (with_gradients(inputs, upstream, impl) for impl in ("triton", "blockwise"))
    assert (found[0] - wanted[0]).abs().max() <= 1e-4 * wanted[0].abs().max()
    for mine, torchs in zip(found[1:3], wanted[1:3], strict=True):
        mine, torchs = mine.float(), torchs.float()
        assert (mine - torchs).norm() <= 8e-3 * torchs.norm()  # a strip and a gradient, each rounded to bf16 once


@pytest.mark.skipif(CUDA or os.environ.get("TRITON_INTERPRET") != "1", reason="where triton interprets")
def test_what_cannot_run_is_refused():
    with pytest.raises(ValueError, match="bfloat16 wrongly"):
        softmax_contrastive(*features(4, 4, 4, torch.bfloat16), impl="triton")
    with pytest.raises(ValueError, match=r"gradient_dtype torch\.int8"):
        softmax_contrastive(*features(4, 4, 4, torch.float32), impl="triton", gradient_dtype=torch.int8)
