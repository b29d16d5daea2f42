"""Every form against torch's logsigmoid, in fp64 exactly, in low precision within twice the reference's own error."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import logsigmoid, normalize

from pretrain.kernels import tiling
from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive

SHAPES = [(1, 1, 1), (8, 8, 4), (252, 507, 123), (5, 17, 3), (64, 64, 32), (3, 3, 2048)]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["negatives", "ignore", "positives"]


@pytest.fixture(autouse=True, params=[1024, 100], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(tiling, "CPU_TILE", request.param)


def features(rows, columns, width, dtype, scale=10.0, bias=-4.0):
    make = [normalize(torch.randn(count, width, dtype=torch.float64), dim=1).to(dtype) for count in (rows, columns)]
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    return *make, torch.tensor(scale, dtype=scalar), torch.tensor(bias, dtype=scalar)


def ids_of(rows, columns, offset, kinds=7):
    """Few different ids, so that most rows have several equals; partners have equal ones."""
    column_ids = torch.randint(0, kinds, (columns,))
    own = (torch.arange(rows) + offset).clamp(0, columns - 1)
    return {"row_ids": column_ids[own], "column_ids": column_ids}


def torchs(rows, columns, scale, bias, offset, duplicates="negatives", row_ids=None, column_ids=None):
    """The loss from logsigmoid alone."""
    logits = scale * rows @ columns.T + bias
    pair = torch.arange(len(columns)) == (offset + torch.arange(len(rows)))[:, None]
    equal = pair if duplicates == "negatives" else row_ids[:, None] == column_ids
    positive = equal | pair if duplicates == "positives" else pair
    losses = -logsigmoid(torch.where(positive, logits, -logits))
    return (losses.masked_fill(equal & ~pair, 0) if duplicates == "ignore" else losses).sum()


def ours(offset, impl, **ids):
    return lambda *inputs: sigmoid_contrastive(*inputs, offset, impl=impl, **ids)


def with_gradients(loss, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    total = loss(*leaves)
    return [total, *torch.autograd.grad(total * 0.25, leaves)]


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("duplicates", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp64_is_torchs_logsigmoid(shape, duplicates, impl):
    rows, columns, _ = shape
    inputs, offset = features(*shape, torch.float64), (columns - rows) // 2
    ids = ids_of(rows, columns, offset) | {"duplicates": duplicates}
    wanted = with_gradients(lambda *x: torchs(*x, offset, **ids), inputs)
    for one, two in zip(with_gradients(ours(offset, impl, **ids), inputs), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("duplicates", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_is_within_twice_the_references_error(shape, dtype, duplicates, within_twice):
    rows, columns, _ = shape
    inputs, offset = features(*shape, dtype), (columns - rows) // 2
    ids = ids_of(rows, columns, offset) | {"duplicates": duplicates}
    exact = with_gradients(ours(offset, "reference", **ids), [x.double() for x in inputs])
    low = with_gradients(ours(offset, "reference", **ids), inputs)
    found = with_gradients(ours(offset, "auto", **ids), inputs)
    # What the gradients of scale and bias sum up; sigmoid(z), of the latter, is at most softplus(z), of the loss.
    terms = [None] * 3 + [inputs[0].double() * exact[1] / inputs[2], exact[0]]
    for one, two, three, summed in zip(found, low, exact, terms, strict=True):
        within_twice(one, two, three, summed)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 300.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_keep_their_last_bits(sign, bias, within_twice):
    """Every pair perfect or perfectly wrong at a scale of 200, where softplus(z) - z would return rounding noise."""
    images, _, _, _ = features(16, 16, 8, torch.float32)
    inputs = (images, sign * images, torch.tensor(200.0), torch.tensor(bias))
    exact = with_gradients(ours(0, "reference"), [x.double() for x in inputs])
    low = with_gradients(ours(0, "reference"), inputs)
    for one, two, three in zip(with_gradients(ours(0, "auto"), inputs), low, exact, strict=True):
        assert one.isfinite().all()
        within_twice(one, two, three)


@pytest.mark.parametrize("offset", [0, 3, -2, 6, 9, -6, 100, -100])
def test_partners_may_lie_anywhere_or_nowhere(offset):
    inputs = features(6, 9, 4, torch.float64)
    wanted = with_gradients(lambda *x: torchs(*x, offset), inputs)
    for one, two in zip(with_gradients(ours(offset, "auto"), inputs), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_blocks_of_columns_add_up():
    rows, columns, scale, bias = features(40, 120, 8, torch.float64)
    parts = [sigmoid_contrastive(rows, columns[at : at + 30], scale, bias, 50 - at) for at in range(0, 120, 30)]
    torch.testing.assert_close(sum(parts), sigmoid_contrastive(rows, columns, scale, bias, 50))


def test_gradcheck_and_a_second_backward():
    inputs = [x.requires_grad_() for x in features(6, 6, 4, torch.float64)]
    assert gradcheck(sigmoid_contrastive, inputs)
    total = sigmoid_contrastive(*inputs)
    first, second = (torch.autograd.grad(total, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "needed",
    [(True, False, False, False), (False, True, True, True), (False, False, True, False), (False, False, False, True)],
)
def test_frozen_sides_take_no_gradient_and_scale_keeps_its_own(needed):
    inputs = features(20, 30, 6, torch.float64)

    def gradients(loss):
        leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        loss(*leaves).backward()
        return [x.grad for x in leaves]

    for found, wanted in zip(gradients(ours(0, "auto")), gradients(lambda *x: torchs(*x, 0)), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_no_gradients_are_made_where_none_are_asked_for():
    inputs = [x.requires_grad_() for x in features(8, 8, 4, torch.float64)]
    with torch.no_grad():
        total = sigmoid_contrastive(*inputs)
    assert not total.requires_grad
    torch.testing.assert_close(total, torchs(*inputs, 0).detach())


@pytest.mark.parametrize("upstream", [1.0, 1 / 2048, 1e-4 / 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_gradients_meet_their_factor_before_they_are_rounded(dtype, upstream):
    """Those of a sum over all pairs overflow fp16, and a mean's factor is too small for it."""
    row = normalize(torch.randn(1, 16), dim=1).repeat(2048, 1).to(dtype)
    inputs = (row, row.clone(), torch.tensor(100.0), torch.tensor(0.0))
    leaves = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(torchs(*wide, 0) * upstream, wide)
    found = torch.autograd.grad(sigmoid_contrastive(*leaves) * upstream, leaves)
    for one, two in zip(found, exact, strict=True):
        rounded = two.to(one.dtype)  # to infinity, or to nothing, only where the truth is
        bound = 2 * torch.finfo(one.dtype).eps * two.abs().clamp(min=torch.finfo(one.dtype).tiny)
        assert torch.equal(one.isfinite(), rounded.isfinite())
        assert ((one.double() - two).abs() <= bound)[rounded.isfinite()].all()


def test_scalars_may_be_of_any_dtype():
    rows, columns, scale, bias = features(8, 8, 4, torch.float32)
    loss = torch.compile(sigmoid_contrastive, fullgraph=True, backend="aot_eager")
    total = loss(rows, columns, scale.double(), bias.half())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, sigmoid_contrastive(rows, columns, scale, bias))


@pytest.mark.parametrize("duplicates", KINDS)
def test_one_operator_under_compile(duplicates):
    inputs, ids = features(20, 30, 8, torch.float32), ids_of(20, 30, 5)

    def loss(rows, columns, scale, bias):
        return sigmoid_contrastive(2 * rows, columns, scale, bias, 5, duplicates=duplicates, **ids) / 20

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(with_gradients(compiled, inputs), with_gradients(loss, inputs), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": torch.zeros(3, 4)}, r"\[3, 4\] and columns \[5, 2\]"),
        ({"rows": torch.zeros(3, 2).double()}, "share one floating dtype"),
        ({"bias": torch.tensor(torch.inf)}, "bias inf must be finite"),
        ({"bias": torch.ones(1)}, r"bias \[1\] must be a scalar"),
        ({"bias": torch.ones((), device="meta")}, "bias on meta must be on cpu"),
        ({"duplicates": "positives"}, r"needs row_ids \[3\] of integers, not None"),
    ],
    ids=str,
)
def test_bad_input_is_refused_with_its_values(change, told):
    one = torch.ones(())
    given = {"rows": torch.zeros(3, 2), "columns": torch.zeros(5, 2), "scale": one, "bias": one}
    with pytest.raises(ValueError, match=told):
        sigmoid_contrastive(**(given | change))
