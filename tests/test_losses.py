"""Drop-in losses: open_clip's numbers on one rank, one process's gradients on many, whatever the flags."""

import inspect
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from pretrain import losses

KINDS = ["ClipLoss", "SigLipLoss"]
N, D = 12, 6


@pytest.fixture(scope="module")
def open_clip():
    """Its losses. Imported here and not above, because every rank imports this file and that import costs seconds."""
    from pretrain.compat import open_clip

    return open_clip.loss


def features(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    image, text = (normalize(torch.randn(N, D, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    scalars = [torch.tensor(value, dtype=dtype) for value in (9.0, -3.0)]
    return [image.to(dtype), text.to(dtype), *scalars]


def run(loss, given):
    leaves = [x.clone().requires_grad_() for x in given]
    total = loss(*leaves)
    total.backward()
    return [total.detach(), *(x.grad for x in leaves)]


def step(package, kind, flags):
    """One rank's loss and gradients after the averaging of DistributedDataParallel; those of features in rank order."""
    if package == "open_clip":  # its import costs seconds
        from pretrain.compat import open_clip

        source = open_clip.loss
    else:
        source = losses
    rank, size = dist.get_rank(), dist.get_world_size()
    own = slice(rank * N // size, (rank + 1) * N // size)
    image, text, scale, bias = features()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = getattr(source, kind)(rank=rank, world_size=size, **flags)
    found = run(loss, [image[own], text[own], scale, bias])
    return [found[0], found[1] / size, found[2] / size, found[3], found[4]]


def joined(parts):
    """What one process would see: losses, scale and bias averaged, feature gradients side by side."""
    columns = list(zip(*parts, strict=True))
    mean = [torch.stack(columns[n]).mean() for n in (0, 3, 4)]
    return [mean[0], torch.cat(columns[1]), torch.cat(columns[2]), mean[1], mean[2]]


def difference(found, wanted):
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_are_open_clips(open_clip, kind):
    for method in ("__init__", "forward"):
        own, theirs = (inspect.signature(getattr(getattr(x, kind), method)) for x in (losses, open_clip))
        assert list(own.parameters) == list(theirs.parameters)
        for name, parameter in theirs.parameters.items():
            required = parameter.default is inspect.Parameter.empty
            assert required or own.parameters[name].default == parameter.default, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_equals_open_clip(open_clip, kind, dtype, tolerance):
    given = features(dtype)
    found, wanted = (run(getattr(x, kind)(), given) for x in (losses, open_clip))
    assert [x.dtype for x in found] == [x.dtype for x in wanted]
    assert difference(found, wanted) < tolerance


FLAGS = [
    ("ClipLoss", {}),
    ("ClipLoss", {"local_loss": True}),
    ("ClipLoss", {"local_loss": True, "gather_with_grad": True, "cache_labels": True}),
    ("SigLipLoss", {}),
    ("SigLipLoss", {"dist_impl": "shift", "cache_labels": True}),
]


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("kind", "flags"), FLAGS, ids=str)
def test_ranks_equal_one_process_whatever_the_flags(open_clip, ranks, kind, flags, size):
    wanted = run(getattr(open_clip, kind)(), features())
    assert difference(joined(ranks(size).run(step, "pretrain", kind, flags)), wanted) < 1e-10


@pytest.mark.ranks
@pytest.mark.slow
def test_open_clips_own_defaults_do_not(open_clip, ranks):
    """What the test above guards against exists: towers get 1/W of their gradient, the scale all of it."""
    wanted = run(open_clip.ClipLoss(), features())
    found = joined(ranks(2).run(step, "open_clip", "ClipLoss", {}))
    torch.testing.assert_close(found[1] * 2, wanted[1])
    torch.testing.assert_close(found[3], wanted[3])


def uneven(kind, counts):
    """As `step`, with batches of different sizes; a rank may have none at all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    image, text, scale, bias = features()
    found = run(getattr(losses, kind)(rank=rank, world_size=size), [image[own], text[own], scale, bias])
    return [found[0], found[1] / size, found[2] / size, found[3], found[4]]


@pytest.mark.ranks
@pytest.mark.parametrize("counts", [(5, 4, 3), (12, 0, 0), (0, 1, 11)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_uneven_ranks_equal_one_process(open_clip, ranks, kind, counts):
    wanted = run(getattr(open_clip, kind)(), features())
    assert difference(joined(ranks(3).run(uneven, kind, counts)), wanted) < 1e-10


def bad(kind, change):
    """What every rank is told when one of them brings something else."""
    rank, size = dist.get_rank(), dist.get_world_size()
    given = {"image_features": torch.ones(3, D), "text_features": torch.ones(3, D), "logit_scale": torch.tensor(2.0)}
    try:
        getattr(losses, kind)(rank=rank, world_size=size)(**(given | (change if rank == 1 else {})))
    except ValueError as error:
        return str(error)
    return "no error"


BAD = [
    ({"text_features": torch.ones(2, D)}, "rank 1: image features [3, 6] and text features [2, 6] must both be [B, D]"),
    ({"logit_scale": torch.tensor(torch.nan)}, "rank 1: logit_scale nan must be finite"),
    (
        {"image_features": torch.ones(3, D).half()},
        "rank 1: image features torch.float16 and text features torch.float32",
    ),
    ({"image_features": torch.ones(3, 2), "text_features": torch.ones(3, 2)}, "rows by rank: [3, 3], widths: [6, 2]"),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("change", "wanted"), BAD, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_on_one_rank_is_told_on_every_rank(ranks, kind, change, wanted):
    told = ranks(2).run(bad, kind, change)
    assert all(wanted in text for text in told), told


@pytest.mark.parametrize("kind", KINDS)
def test_output_dict(kind):
    loss = getattr(losses, kind)()
    given = features()
    assert loss(*given, output_dict=True) == {"contrastive_loss": loss(*given)}


@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_bias_may_be_numbers_or_vectors_of_one(kind):
    loss = getattr(losses, kind)()
    image, text, scale, bias = features()
    wanted = loss(image, text, scale, bias)
    assert torch.equal(loss(image, text, 9.0, -3.0), wanted)
    assert torch.equal(loss(image, text, scale[None], bias[None]), wanted)
    assert loss(image, text, scale[None], bias[None]).shape == ()


def test_the_bias_of_a_softmax_gets_a_zero_gradient():
    assert run(losses.ClipLoss(), features())[4] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_features_are_computed_in_fp32(open_clip, kind, dtype):
    given = [x.to(dtype) for x in features()]
    found, wanted = getattr(losses, kind)()(*given), getattr(open_clip, kind)()(*(x.double() for x in given))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="use_horovod True is not supported"):
        losses.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl 'ring' must be one of"):
        losses.SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize(
    ("kind", "flags"), [("ClipLoss", {"local_loss": True}), ("SigLipLoss", {"dist_impl": "bidir"})]
)
def test_ignored_flags_say_so_and_defaults_say_nothing(kind, flags):
    with pytest.warns(UserWarning, match="gradients are those of one process on the whole batch in any setting"):
        getattr(losses, kind)(rank=0, world_size=2, **flags)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(losses, kind)(rank=0, world_size=2)
        getattr(losses, kind)(**flags)


def alone(kind):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        getattr(losses, kind)()
    return [str(warning.message) for warning in told]


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_are_not_told_of_each_other_are_warned(ranks, kind):
    for told in ranks(2).run(alone, kind):
        assert "world_size 1, but 2 ranks are running" in told[0]
    assert alone(kind) == []
