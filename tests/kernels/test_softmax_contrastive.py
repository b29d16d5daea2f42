"""Every form against torch's cross-entropy: in fp64 exactly, in low precision within twice the reference's error."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy, normalize

from pretrain.kernels import tiling
from pretrain.kernels.softmax_contrastive import softmax_contrastive

SHAPES = [(1, 1, 1), (8, 8, 4), (252, 507, 123), (5, 17, 3), (64, 64, 32), (3, 3, 2048)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["negatives", "ignore", "positives"]


@pytest.fixture(autouse=True, params=[1024, 100], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    """100 divides none of the larger shapes, so that every edge is ragged."""
    monkeypatch.setattr(tiling, "CPU_TILE", request.param)


def features(rows, columns, width, dtype, scale=7.5):
    make = [normalize(torch.randn(count, width, dtype=torch.float64), dim=1).to(dtype) for count in (rows, columns)]
    return make[0], make[1], torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def ids_of(rows, columns, offset, kinds=7):
    """Few different ids, so that most rows have several equals; partners have equal ones."""
    column_ids = torch.randint(0, kinds, (columns,))
    return {"row_ids": column_ids[offset : offset + rows].clone(), "column_ids": column_ids}


def torchs(rows, columns, scale, offset, duplicates="negatives", row_ids=None, column_ids=None):
    """The loss from cross_entropy alone; with several positives, their mean log-probability."""
    logits, own = scale * rows @ columns.T, offset + torch.arange(len(rows))
    if duplicates == "negatives":
        by_row, by_column = logits, logits.T[own]
        lines = (cross_entropy(by_row, own, reduction="none"), cross_entropy(by_column, own - offset, reduction="none"))
        return sum(lines) / 2
    equal = row_ids[:, None] == column_ids
    if duplicates == "ignore":
        pair = torch.zeros_like(equal)
        pair[torch.arange(len(rows)), own] = True
        kept = logits.masked_fill(equal & ~pair, -torch.inf)
        lines = (cross_entropy(kept, own, reduction="none"), cross_entropy(kept.T[own], own - offset, reduction="none"))
        return sum(lines) / 2
    by_row, by_column = (
        -(x.log_softmax(1) * mask).sum(1) / mask.sum(1) for x, mask in ((logits, equal), (logits.T[own], equal.T[own]))
    )
    return (by_row + by_column) / 2


def with_gradients(loss, inputs, upstream):
    leaves = [x.clone().requires_grad_() for x in inputs]
    losses = loss(*leaves)
    return [losses, *torch.autograd.grad(losses, leaves, upstream.to(losses.dtype))]


def ours(offset, impl, **ids):
    return lambda rows, columns, scale: softmax_contrastive(rows, columns, scale, None, offset, impl=impl, **ids)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("duplicates", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp64_is_torchs_cross_entropy(shape, duplicates, impl):
    rows, columns, _ = shape
    inputs, upstream, offset = features(*shape, torch.float64), torch.rand(rows), (columns - rows) // 2
    ids = ids_of(rows, columns, offset) | {"duplicates": duplicates}
    wanted = with_gradients(lambda *x: torchs(*x, offset, **ids), inputs, upstream)
    for one, two in zip(with_gradients(ours(offset, impl, **ids), inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("duplicates", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_is_within_twice_the_references_error(shape, dtype, duplicates, within_twice):
    rows, columns, _ = shape
    inputs, upstream, offset = features(*shape, dtype), torch.rand(rows), (columns - rows) // 2
    ids = ids_of(rows, columns, offset) | {"duplicates": duplicates}
    exact = with_gradients(ours(offset, "reference", **ids), [x.double() for x in inputs], upstream)
    low = with_gradients(ours(offset, "reference", **ids), inputs, upstream)
    found = with_gradients(ours(offset, "auto", **ids), inputs, upstream)
    terms = [None] * 3 + [inputs[0].double() * exact[1] / inputs[2]] * 1  # what the scale's gradient sums up
    for one, two, three, summed in zip(found, low, exact, terms, strict=True):
        within_twice(one, two, three, summed)


@pytest.mark.parametrize("case", ["converged", "opposite", "all at 1", "all at -1", "rows at -1"])
@pytest.mark.parametrize("scale", [50.0, 100.0, 200.0])
def test_extreme_scales_and_cosines_are_finite_and_right(case, scale):
    """Cosines of 1 and -1 at any scale, where sums under one shift over- or underflow and every row gets its own."""
    one, line = normalize(torch.randn(40, 8), dim=1), normalize(torch.randn(1, 8), dim=1).repeat(40, 1)
    mixed = torch.cat([-line[:3], line[3:]])
    cases = {"converged": (one, one), "opposite": (one, -one), "all at 1": (line, line), "all at -1": (line, -line)}
    rows, columns = (cases | {"rows at -1": (mixed, line)})[case]
    inputs, upstream = (rows, columns, torch.tensor(scale)), torch.full((40,), 1 / 40)
    exact = with_gradients(lambda *x: torchs(*x, 0), [x.double() for x in inputs], upstream)
    low = with_gradients(lambda *x: torchs(*x, 0), inputs, upstream)
    rounding = torch.finfo(torch.float32).eps * scale
    for found, torchs_own, wanted in zip(with_gradients(ours(0, "auto"), inputs, upstream), low, exact, strict=True):
        assert found.isfinite().all()
        assert (found - wanted).abs().max() <= 2 * (torchs_own - wanted).abs().max() + 4 * rounding * scale


def test_gradcheck_and_a_second_backward():
    inputs = [x.requires_grad_() for x in features(6, 6, 4, torch.float64)]
    assert gradcheck(lambda *x: softmax_contrastive(*x), inputs)
    losses = softmax_contrastive(*inputs).sum()
    first, second = (torch.autograd.grad(losses, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, True), (False, False, True), (False, True, False)]
)
def test_frozen_sides_take_no_gradient_and_scale_keeps_its_own(needed):
    inputs = features(20, 20, 6, torch.float64)

    def gradients(loss):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        loss(*leaves).sum().backward()
        return [x.grad for x in leaves]

    for found, wanted in zip(gradients(softmax_contrastive), gradients(lambda *x: torchs(*x, 0)), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_the_bias_changes_nothing_and_has_a_zero_gradient():
    inputs, bias = features(9, 9, 4, torch.float32), torch.tensor(3.0, requires_grad=True)
    losses = softmax_contrastive(*inputs, bias)
    assert torch.equal(losses, softmax_contrastive(*inputs))
    losses.sum().backward()
    assert bias.grad == 0


@pytest.mark.parametrize("duplicates", KINDS)
def test_one_operator_under_compile(duplicates):
    inputs, ids = features(20, 30, 8, torch.float32), ids_of(20, 30, 5)

    def loss(rows, columns, scale):
        return softmax_contrastive(2 * rows, columns, scale, None, 5, duplicates=duplicates, **ids).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one = torch.ones(())
    for found, wanted in zip(with_gradients(compiled, inputs, one), with_gradients(loss, inputs, one), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_a_column_that_every_row_leaves_out_has_no_gradient(impl):
    """Its sum is empty, its maximum minus infinity: it must not poison the others."""
    inputs, ids = features(4, 6, 8, torch.float32), torch.tensor([7, 7, 7, 7, 1, 7])
    told = {"duplicates": "ignore", "row_ids": ids[:4], "column_ids": ids}
    upstream = torch.rand(4)
    found = with_gradients(ours(0, impl, **told), inputs, upstream)
    wanted = with_gradients(lambda *x: torchs(*x, 0, **told), [x.double() for x in inputs], upstream)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2][5], torch.zeros(8))


def test_the_scale_may_be_of_any_dtype():
    rows, columns, scale = features(8, 8, 4, torch.float32)
    loss = torch.compile(softmax_contrastive, fullgraph=True, backend="aot_eager")
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        own = scale.to(kind).requires_grad_()
        losses = loss(rows, columns, own)
        losses.sum().backward()
        assert (losses.dtype, own.grad.dtype) == (torch.float32, kind)
        torch.testing.assert_close(losses, softmax_contrastive(rows, columns, scale))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scale": 3.0}, r"scale 3.0 must be a tensor \[\]"),
        ({"scale": torch.tensor(torch.nan)}, "scale nan must be finite"),
        ({"duplicates": "ignore", "row_ids": torch.ones(3).bool()}, r"of integers, not \(\[3\], torch.bool"),
        (
            {"duplicates": "ignore", "row_ids": torch.arange(3), "column_ids": torch.tensor([0, 1, 5, 2, 3])},
            r"row_ids\[2\] 2 must equal column_ids\[2\] 5",
        ),
        ({"rows": torch.zeros(3, 4)}, r"\[3, 4\] and columns \[5, 2\]"),
        ({"rows": torch.zeros(3, 2).double()}, "share one floating dtype"),
        ({"rows": torch.zeros(3, 2, dtype=torch.int64)}, "share one floating dtype"),
        ({"rows": torch.zeros(3, 2, device="meta")}, "rows on meta and columns on cpu must share one device"),
        ({"scale": torch.ones(1)}, r"scale \[1\] must be a scalar"),
        ({"offset": 3}, "offset 3: 3 rows need their partners among 5 columns"),
        ({"offset": -1}, "offset -1"),
        ({"rows": torch.zeros(0, 2)}, "offset 0: 0 rows"),
        ({"impl": "fast"}, "impl 'fast' must be one of auto, triton, blockwise, reference"),
        ({"duplicates": "drop"}, "duplicates 'drop' must be one of negatives, ignore, positives"),
        ({"duplicates": "ignore"}, r"needs row_ids \[3\] of integers, not None"),
        ({"duplicates": "ignore", "row_ids": torch.zeros(3)}, r"row_ids \[3\] of integers, not \(\[3\], torch.float32"),
    ],
    ids=str,
)
def test_bad_input_is_refused_with_its_values(change, told):
    given = {"rows": torch.zeros(3, 2), "columns": torch.zeros(5, 2), "scale": torch.ones(())}
    with pytest.raises(ValueError, match=told):
        softmax_contrastive(**(given | change))
