"""Blockwise against the reference, in fp64 exactly and in low precision within twice the reference's own error."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from pretrain.kernels import tiling
from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive

SHAPES = [(1, 1, 1), (8, 8, 4), (252, 507, 123), (5, 17, 3), (64, 64, 32)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=[1024, 100], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(tiling, "CPU_TILE", request.param)


def features(rows, columns, width, dtype, scale=10.0, bias=-4.0):
    make = [normalize(torch.randn(count, width, dtype=torch.float64), dim=1).to(dtype) for count in (rows, columns)]
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    return *make, torch.tensor(scale, dtype=scalar), torch.tensor(bias, dtype=scalar)


def run(inputs, offset, impl):
    leaves = [x.clone().requires_grad_() for x in inputs]
    total = sigmoid_contrastive(*leaves, offset, impl)
    return [total, *torch.autograd.grad(total * 0.25, leaves)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype, within_twice):
    rows, columns, _ = shape
    inputs = features(*shape, dtype)
    offset = (columns - rows) // 2
    exact = run([x.double() for x in inputs], offset, "reference")
    for one, two, three in zip(run(inputs, offset, "auto"), run(inputs, offset, "reference"), exact, strict=True):
        within_twice(one, two, three)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 300.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_keep_their_last_bits(sign, bias, within_twice):
    """Every pair perfect or perfectly wrong at a scale of 200, where softplus(z) - z would return rounding noise."""
    images, _, _, _ = features(16, 16, 8, torch.float32)
    inputs = (images, sign * images, torch.tensor(200.0), torch.tensor(bias))
    exact = run([x.double() for x in inputs], 0, "reference")
    for one, two, three in zip(run(inputs, 0, "auto"), run(inputs, 0, "reference"), exact, strict=True):
        assert one.isfinite().all()
        within_twice(one, two, three)


@pytest.mark.parametrize("offset", [0, 3, -2, 6, 9, -6, 100, -100])
def test_partners_may_lie_anywhere_or_nowhere(offset):
    inputs = features(6, 9, 4, torch.float64)
    for one, two in zip(run(inputs, offset, "auto"), run(inputs, offset, "reference"), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in features(6, 6, 4, torch.float64)]
    assert gradcheck(sigmoid_contrastive, inputs)


@pytest.mark.parametrize(
    "needed", [(True, False, False, False), (False, True, True, True), (False, False, True, False)]
)
def test_frozen_sides_take_no_gradient_and_scale_keeps_its_own(needed):
    inputs = features(20, 30, 6, torch.float64)

    def gradients(impl):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        sigmoid_contrastive(*leaves, 0, impl).backward()
        return [x.grad for x in leaves]

    for found, wanted in zip(gradients("auto"), gradients("reference"), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_no_grad_gives_the_same_value():
    inputs = [x.requires_grad_() for x in features(20, 30, 6, torch.float32)]
    with torch.no_grad():
        silent = sigmoid_contrastive(*inputs)
    assert not silent.requires_grad
    assert silent == sigmoid_contrastive(*inputs)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"bias \[1\] must be a scalar"):
        sigmoid_contrastive(torch.zeros(3, 2), torch.zeros(5, 2), torch.ones(()), torch.zeros(1))
