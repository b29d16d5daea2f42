"""What holds for every objective, and the numbers of each from its paper's equation, in explicit loops."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from pretrain import exchange, objectives
from pretrain.errors import UserError
from pretrain.values import Features, Pairs

NAMES = objectives.names()
KINDS = ["negatives", "ignore", "positives"]


def features(count=6, width=4, dtype=torch.float64, scale=5.0, bias=-2.0):
    image, text = (normalize(torch.randn(count, width, dtype=dtype), dim=1) for _ in range(2))
    return image, text, torch.tensor(scale, dtype=dtype), torch.tensor(bias, dtype=dtype)


def loss(name, given, ids=None, **options):
    method = objectives.find(name)
    terms = method(method.Options(**options))(Pairs(Features(*given), exchange.make("local", 0, 1), ids))
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


BAD = [
    ({"image": torch.zeros(0, 4), "text": torch.zeros(0, 4)}, "at least one row on one of them; rows by rank: .0."),
    ({"text": torch.zeros(2, 4)}, r"image features \[3, 4\] and text features \[2, 4\] must both be \[B, D\]"),
    ({"image": torch.zeros(3), "text": torch.zeros(3)}, r"\[3\] and text features \[3\] must both be \[B, D\]"),
    ({"text": torch.zeros(3, 4).double()}, "image features torch.float32 and text features torch.float64"),
    ({"image": torch.zeros(3, 4).long(), "text": torch.zeros(3, 4).long()}, "must share one floating dtype"),
    ({"text": torch.zeros(3, 4, device="meta")}, "text features on meta must be on cpu, as the image features are"),
    ({"logit_scale": torch.tensor(torch.inf)}, "logit_scale inf must be finite"),
    ({"logit_bias": torch.tensor(torch.nan)}, "logit_bias nan must be finite"),
    ({"logit_scale": torch.ones(1)}, r"logit_scale \[1\] must be a scalar \[\]"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("change", "told"), BAD, ids=str)
def test_bad_batches_are_refused_with_their_values(name, change, told):
    good = {"image": torch.zeros(3, 4), "text": torch.zeros(3, 4), "logit_scale": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=told):
        loss(name, (good | {"logit_bias": torch.tensor(0.0)} | change).values())


@pytest.mark.parametrize("name", NAMES)
def test_features_too_large_for_their_products_are_refused(name):
    large, scalars = torch.full((3, 4), 1e5), (torch.tensor(1.0), torch.tensor(0.0))
    way = exchange.make("local", 0, 1, exchange.Options(products=torch.float16))
    method = objectives.find(name)
    with pytest.raises(ValueError, match=r"features reach 1e\+05, and torch.float16 ends at 6.55e\+04: normalise them"):
        method(method.Options())(Pairs(Features(large, large, *scalars), way))


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_sample_are_what_the_option_says(name):
    """Two rows of one sample: negatives as in the papers, left out, or positives; told apart by sample id alone."""
    image, text, scale, bias = features()
    text, ids = normalize(image + text / 2, dim=1), torch.tensor([7, 3, 5, 9, 3, 2])
    found = {kind: loss(name, (image, text, scale, bias), ids, duplicates=kind) for kind in KINDS}
    equal, own = ids[:, None] == ids, torch.eye(6, dtype=torch.bool)
    logits = scale * image @ text.T + (bias if name == "siglip" else 0)
    torch.testing.assert_close(found["negatives"], loss(name, (image, text, scale, bias)))
    if name == "clip":
        kept = logits.masked_fill(equal & ~own, -torch.inf)
        wanted = {"ignore": sum(cross_entropy(x, torch.arange(6)) for x in (kept, kept.T)) / 2}
        share = equal / equal.sum(1, keepdim=True).double()
        wanted["positives"] = sum(-(x.log_softmax(1) * share).sum(1).mean() for x in (logits, logits.T)) / 2
    else:
        losses = {kind: -logsigmoid(torch.where(mask, logits, -logits)) for kind, mask in (("o", own), ("e", equal))}
        wanted = {"ignore": losses["o"].masked_fill(equal & ~own, 0).sum() / 6, "positives": losses["e"].sum() / 6}
    for kind, value in wanted.items():
        torch.testing.assert_close(found[kind], value)
        assert (found[kind] - found["negatives"]).abs() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_duplicates_need_sample_ids(name):
    with pytest.raises(ValueError, match="duplicates 'ignore' needs sample ids, and this batch has none"):
        loss(name, features(), duplicates="ignore")


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
