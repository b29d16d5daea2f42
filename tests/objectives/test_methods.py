"""What holds for every objective, and the numbers of each from its paper's equation, in explicit loops."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from pretrain import exchange, objectives
from pretrain.errors import UserError
from pretrain.values import Features, Pairs

NAMES = objectives.names()


def features(count=6, width=4, dtype=torch.float64, scale=5.0, bias=-2.0):
    image, text = (normalize(torch.randn(count, width, dtype=dtype), dim=1) for _ in range(2))
    return image, text, torch.tensor(scale, dtype=dtype), torch.tensor(bias, dtype=dtype)


def loss(name, given, **options):
    method = objectives.find(name)
    terms = method(method.Options(**options))(Pairs(Features(*given), exchange.make("local", 0, 1)))
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    given = [x.requires_grad_() for x in features()]
    used = given if objectives.find(name).init_logit_bias is not None else given[:3]
    assert torch.autograd.gradcheck(lambda *x: loss(name, x), used)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_batch_does_not_matter(name):
    image, text, scale, bias = features()
    order = torch.randperm(len(image))
    torch.testing.assert_close(
        loss(name, (image[order], text[order], scale, bias)), loss(name, (image, text, scale, bias))
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_multiplies_every_term(name):
    given = features()
    torch.testing.assert_close(loss(name, given, weight=2.5), 2.5 * loss(name, given))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    def run(on):
        torch.manual_seed(0)
        given = [x.requires_grad_() for x in features(40, 16, torch.float32, scale=80.0)]
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            total = loss(name, given)
        total.backward()
        return [total.detach(), *(x.grad for x in given[:3])]

    for one, two in zip(run(True), run(False), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_features_are_computed_in_fp32(name):
    given = [x.to(torch.bfloat16) for x in features(40, 16)]
    found, wanted = loss(name, given), loss(name, [x.double() for x in given])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_names_its_source(name):
    assert "Source: " in (objectives.find(name).__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shapes", [((0, 4), (0, 4)), ((3, 4), (2, 4))])
def test_batches_without_pairs_are_refused(name, shapes):
    image, text = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"must both be \[B, D\] with at least one row"):
        loss(name, (image, text, torch.tensor(1.0), torch.tensor(0.0)))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_clip_is_its_equation(smoothing):
    image, text, scale, bias = features()
    total = 0.0
    for one, other in ((image, text), (text, image)):
        for i in range(len(one)):
            logits = [float(scale * (one[i] @ other[j])) for j in range(len(other))]
            log_sum = math.log(sum(math.exp(x) for x in logits))
            target = (1 - smoothing) * logits[i] + smoothing * sum(logits) / len(logits)
            total += (log_sum - target) / (2 * len(one))
    assert float(loss("clip", (image, text, scale, bias), label_smoothing=smoothing)) == pytest.approx(total, abs=1e-12)


def test_clip_smoothing_is_torchs():
    image, text, scale, _ = features()
    logits, own = scale * image @ text.T, torch.arange(len(image))
    wanted = sum(cross_entropy(x, own, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    torch.testing.assert_close(loss("clip", (image, text, scale), label_smoothing=0.1), wanted)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_clip_refuses_impossible_smoothing(smoothing):
    with pytest.raises(UserError, match=rf"label_smoothing {smoothing} .* must lie in \[0, 1\)"):
        objectives.find("clip").Options(label_smoothing=smoothing)


def test_siglip_is_its_equation():
    image, text, scale, bias = features()
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            label = 1 if i == j else -1
            logit = float(scale * (image[i] @ text[j]) + bias)
            total += math.log1p(math.exp(-label * logit)) / len(image)
    assert float(loss("siglip", (image, text, scale, bias))) == pytest.approx(total, abs=1e-12)


def test_starts_and_ceilings():
    clip, siglip = objectives.find("clip"), objectives.find("siglip")
    assert (clip.init_logit_scale, clip.init_logit_bias, clip.max_logit_scale) == (1 / 0.07, None, 100)
    assert (siglip.init_logit_scale, siglip.init_logit_bias, siglip.max_logit_scale) == (10, -10, math.inf)
