"""Blockwise against the reference, in fp64 exactly and in low precision within twice the reference's own error."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from pretrain.kernels import tiling
from pretrain.kernels.softmax_contrastive import softmax_contrastive, softmax_maxima

SHAPES = [(1, 1, 1), (8, 8, 4), (252, 507, 123), (5, 17, 3), (64, 64, 32)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=[1024, 100], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    """100 divides none of the larger shapes, so that every edge is ragged."""
    monkeypatch.setattr(tiling, "CPU_TILE", request.param)


def features(rows, columns, width, dtype):
    make = [normalize(torch.randn(count, width, dtype=torch.float64), dim=1).to(dtype) for count in (rows, columns)]
    return make[0], make[1], torch.tensor(7.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def shifts(rows, columns, like, tracked):
    if not tracked:
        return like.new_tensor(1.25), None
    return torch.rand(rows).to(like), torch.rand(columns).to(like)


def run(inputs, shift, offset, impl, upstream):
    """The three outputs and the three gradients under given upstream gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    sums = softmax_contrastive(*leaves, *shift, offset, impl)
    grads = torch.autograd.grad(sums, leaves, [u.to(s.dtype) for u, s in zip(upstream, sums, strict=True)])
    return [*sums, *grads]


@pytest.mark.parametrize("tracked", [False, True], ids=["one shift", "tracked"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype, tracked, within_twice):
    rows, columns, width = shape
    inputs = features(rows, columns, width, dtype)
    shift = shifts(rows, columns, inputs[2], tracked)
    upstream = [torch.randn(rows), torch.randn(columns), torch.randn(rows)]
    wide = [x.double() for x in inputs]
    wide_shift = [None if s is None else s.double() for s in shift]
    offset = (columns - rows) // 2
    exact = run(wide, wide_shift, offset, "reference", upstream)
    low = run(inputs, shift, offset, "reference", upstream)
    found = run(inputs, shift, offset, "auto", upstream)
    for one, two, three in zip(found, low, exact, strict=True):
        within_twice(one, two, three)


@pytest.mark.parametrize("offset", [0, 3, -2, 6, 9, -6, 100, -100])
def test_partners_may_lie_anywhere_or_nowhere(offset):
    inputs = features(6, 9, 4, torch.float64)
    shift = (torch.tensor(0.0, dtype=torch.float64), None)
    upstream = [torch.randn(6), torch.randn(9), torch.randn(6)]
    both = [run(inputs, shift, offset, impl, upstream) for impl in ("auto", "reference")]
    for one, two in zip(*both, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tracked", [False, True])
def test_gradcheck(tracked):
    inputs = [x.requires_grad_() for x in features(6, 6, 4, torch.float64)]
    shift = shifts(6, 6, inputs[2], tracked)
    assert gradcheck(lambda *x: tuple(softmax_contrastive(*x, *shift, 0)), inputs)


def test_blocks_of_columns_add_up():
    rows, columns, scale = features(40, 120, 8, torch.float64)
    shift = scale.new_tensor(0.5)
    whole = softmax_contrastive(rows, columns, scale, shift, None, 50)
    parts = [softmax_contrastive(rows, columns[at : at + 30], scale, shift, None, 50 - at) for at in range(0, 120, 30)]
    torch.testing.assert_close(sum(p.row_sums for p in parts), whole.row_sums)
    torch.testing.assert_close(sum(p.positives for p in parts), whole.positives)
    torch.testing.assert_close(torch.cat([p.column_sums for p in parts]), whole.column_sums)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, True), (False, False, True), (False, True, False)]
)
def test_frozen_sides_take_no_gradient_and_scale_keeps_its_own(needed):
    inputs = features(20, 30, 6, torch.float64)
    shift = inputs[2].new_tensor(0.0)

    def gradients(impl):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        sums = softmax_contrastive(*leaves, shift, None, 0, impl)
        (sums.row_sums.log().sum() + sums.column_sums.log().sum() - sums.positives.sum()).backward()
        return [x.grad for x in leaves]

    for found, wanted in zip(gradients("auto"), gradients("reference"), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_maxima():
    inputs = features(252, 507, 23, torch.float64)
    for found, wanted in zip(softmax_maxima(*inputs), softmax_maxima(*inputs, impl="reference"), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": torch.zeros(3, 4)}, r"\[3, 4\] and columns \[5, 2\]"),
        ({"rows": torch.zeros(3, 2).double()}, "share one floating dtype"),
        ({"scale": torch.ones(1)}, r"scale \[1\] must be a scalar"),
        ({"shift": torch.zeros(3)}, r"shift shapes \[\(3,\)\] must be \[\(\)\]"),
        ({"column_shift": torch.zeros(5)}, r"must be \[\(3,\), \(5,\)\] for 3 rows and 5 columns"),
    ],
)
def test_wrong_shapes_are_refused(change, told):
    given = {"rows": torch.zeros(3, 2), "columns": torch.zeros(5, 2), "scale": torch.ones(()), "shift": torch.zeros(())}
    with pytest.raises(ValueError, match=told):
        softmax_contrastive(**(given | change))
