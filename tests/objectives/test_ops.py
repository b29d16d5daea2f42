"""Range and accuracy of the softmax: where the common shift holds, where it must give way, and that all ranks agree."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, normalize

from pretrain import exchange
from pretrain.kernels.softmax_contrastive.loss import Sweep
from pretrain.kernels.softmax_contrastive.statistics import cross_entropy as cross_entropy_of_sums
from pretrain.objectives import ops
from pretrain.values import Features, Pairs


def unit(count, width, seed):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def batches():
    """Pairs of cosine 1, -1 and anything, and batches in which whole rows or columns lie at -1."""
    one, two, line = unit(12, 8, 0), unit(12, 8, 1), unit(1, 8, 2).repeat(12, 1)
    mixed = torch.cat([-line[:3], line[3:]])
    return {
        "random": (one, two),
        "converged": (one, one),
        "opposite": (one, -one),
        "all at -1": (line, -line),
        "all at 1": (line, line),
        "three rows at -1": (mixed, line),
        "three columns at -1": (line, mixed),
    }


def own_loss(image, text, scale):
    return ops.symmetric_cross_entropy(Pairs(Features(image, text, scale), exchange.make("local", 0, 1))).mean()


def torch_loss(image, text, scale):
    logits, own = scale * image @ text.T, torch.arange(len(image))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def run(loss, image, text, scale, dtype):
    leaves = [torch.as_tensor(x, dtype=dtype).clone().requires_grad_() for x in (image, text, scale)]
    total = loss(*leaves)
    total.backward()
    return [total.detach().double(), *(x.grad.double() for x in leaves)]


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0, 100.0, 200.0])
@pytest.mark.parametrize("name", batches())
def test_any_scale_and_cosine_is_as_accurate_as_torchs_own_cross_entropy(name, scale):
    image, text = batches()[name]
    exact = run(torch_loss, image, text, scale, torch.float64)
    low = run(torch_loss, image, text, scale, torch.float32)
    found = run(own_loss, image, text, scale, torch.float32)
    # Rounding of a logit shifts a probability by as much; gradients carry the scale, that of the scale sums all rows.
    rounding = torch.finfo(torch.float32).eps * max(1.0, scale)
    for got, torchs, wanted, size in zip(found, low, exact, (1.0, scale, scale, 1.0), strict=True):
        assert got.isfinite().all()
        allowed = 2 * ((torchs - wanted).abs().max() + rounding * size)
        assert (got - wanted).abs().max() <= allowed


def test_a_nearly_converged_loss_keeps_its_last_bits():
    """log(sum) + shift - positive would be wrong by 1e-5 here, a hundred times the loss."""
    image = unit(64, 32, 0)
    text = normalize(image + 0.05 * unit(64, 32, 1), dim=1)
    wanted = run(torch_loss, image, text, 60.0, torch.float64)[0]
    torchs = run(torch_loss, image, text, 60.0, torch.float32)[0]
    found = run(own_loss, image, text, 60.0, torch.float32)[0]
    assert 0 < wanted < 1e-4
    assert (found - wanted).abs() <= 2 * ((torchs - wanted).abs() + torch.finfo(torch.float32).eps)


def test_the_logarithm_divides_by_the_positive_first():
    """A sum 2e-6 above the positive's own exponential, at logits where one fp32 step is up to 4e-6."""
    positives = torch.linspace(-50, 70, 1000)
    sums = (positives.double().exp() * (1 + 2e-6)).float()
    losses = cross_entropy_of_sums(sums, positives, torch.tensor(0.0))
    assert (losses.double() - 2e-6).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_the_common_shift_serves_what_training_meets(monkeypatch):
    """Three times the cost would be paid in silence: at CLIP's ceiling of 100 ordinary features must not need it."""

    def never(sweep):
        raise AssertionError("fell back to tracked shifts")

    monkeypatch.setattr(Sweep, "_tracked_sums", never)
    assert own_loss(unit(64, 16, 0), unit(64, 16, 1), torch.tensor(100.0)).isfinite()


def test_features_that_are_not_unit_norm_are_right_too():
    image, text = 9 * unit(12, 8, 0), 7 * unit(12, 8, 1)
    for found, wanted in zip(
        run(own_loss, image, text, 30.0, torch.float32), run(torch_loss, image, text, 30.0, torch.float64), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_nan_features_give_a_nan_loss_and_no_hang():
    image = unit(12, 8, 0)
    image[3, 2] = torch.nan
    assert own_loss(image, unit(12, 8, 1), torch.tensor(10.0)).isnan()


def on_a_rank(images, texts, scale):
    rank, size = dist.get_rank(), dist.get_world_size()
    own = slice(rank * len(images) // size, (rank + 1) * len(images) // size)
    leaves = [x.clone().requires_grad_() for x in (images[own], texts[own], torch.tensor(scale))]
    fell_back, tracked = [], Sweep._tracked_sums
    Sweep._tracked_sums = lambda sweep: fell_back.append(True) or tracked(sweep)
    try:
        loss = ops.symmetric_cross_entropy(Pairs(Features(*leaves), exchange.make("gather", rank, size))).mean()
        loss.backward()
    finally:
        Sweep._tracked_sums = tracked
    return [loss.detach(), *(x.grad / size for x in leaves)], bool(fell_back)


@pytest.mark.ranks
def test_all_ranks_fall_back_when_the_rows_of_one_need_it(ranks):
    """Only the first rank's rows underflow; had it alone asked for maxima, the others would not have answered."""
    images, texts = batches()["three rows at -1"]
    found = ranks(4).run(on_a_rank, images, texts, 100.0)
    assert all(fell_back for _, fell_back in found)
    loss, image, text, scale = run(torch_loss, images, texts, 100.0, torch.float64)
    parts = [values for values, _ in found]
    torch.testing.assert_close(torch.stack([p[0] for p in parts]).mean().double(), loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]).double(), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]).double(), text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(p[3] for p in parts).double(), scale, rtol=1e-4, atol=1e-6)
