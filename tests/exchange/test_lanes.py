"""Columns announced before the image tower, and gradients that are still travelling while it goes backward."""

import math

import pytest
import torch
from torch.nn.functional import linear, normalize

from pretrain import objectives
from pretrain.exchange import Options
from pretrain.exchange.gather import Gather
from pretrain.exchange.local import Local
from pretrain.exchange.transport import Alone
from pretrain.objectives import ops
from pretrain.values import Features, Pairs

WIDTH, D = 5, 4
EVEN, UNEVEN = [3, 3, 3, 3], [4, 0, 3, 2]
MIXES = {
    "clip": [("clip", {})],
    "siglip": [("siglip", {})],
    "both": [("clip", {}), ("siglip", {"weight": 0.5})],
    # Smoothing uses the text features directly besides.
    "all": [("clip", {"label_smoothing": 0.3}), ("siglip", {}), ("clip", {"duplicates": "positives"})],
}


class Model:
    """Two linear towers, a scale and a bias, and the part of one batch that a rank holds."""

    def __init__(self, counts, rank, dtype=torch.float64):
        generator = torch.Generator().manual_seed(sum(counts))

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        rows = slice(sum(counts[:rank]), sum(counts[: rank + 1])) if rank is not None else slice(None)
        self.images, self.texts = (random(sum(counts), WIDTH)[rows] for _ in range(2))
        self.ids = (torch.arange(sum(counts)) // 2)[rows]
        self.image_tower, self.text_tower = random(D, WIDTH), random(D, WIDTH)
        self.scale, self.bias = torch.tensor(6.0, dtype=dtype), torch.tensor(-1.0, dtype=dtype)
        for parameter in self.parameters():
            parameter.requires_grad_()

    def parameters(self):
        return [self.image_tower, self.text_tower, self.scale, self.bias]

    def features(self, announce, seen=lambda gradient: None):
        """Text first; `seen` is told when the image tower's own backward starts."""
        text = announce(normalize(linear(self.texts, self.text_tower), dim=1))
        image = linear(self.images, self.image_tower)
        if image.requires_grad:
            image.register_hook(seen)
        return Features(normalize(image, dim=1), text, self.scale, self.bias)

    def gradients(self):
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]


def total(mix, pairs):
    methods = [(objectives.find(name), options) for name, options in MIXES[mix]]
    terms = [term for method, options in methods for term in method(method.Options(**options))(pairs).values()]
    return torch.stack(terms).sum()


def alone(mix, counts, times=1):
    model = Model(counts, None)
    loss = total(mix, Pairs(model.features(lambda text: text), Local(Alone()), model.ids))
    for _ in range(times):
        loss.backward(retain_graph=True)
    return [loss.detach(), *model.gradients()]


def assert_equal(found, wanted):
    for one, two in zip((sum(parts) / len(found) for parts in zip(*found, strict=True)), wanted, strict=True):
        assert (one - two).abs().max() <= 1e-10 * max(1e-3, two.abs().max())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("counts", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("times", [1, 2])
def test_announced_columns_give_the_same_gradients(virtual, mix, counts, size, times):
    """Backward twice gives twice the gradient, as torch adds it up."""
    counts = counts[:size]

    def on(transport):
        way, model = Gather(transport, Options(checks=math.inf)), Model(counts, transport.rank)
        features = model.features(lambda text: way.announce(text, len(MIXES[mix])))
        loss = total(mix, Pairs(features, way, model.ids))
        for _ in range(times):
            loss.backward(retain_graph=True)
        return [loss.detach(), *model.gradients()]

    for seed in range(2):
        assert_equal(virtual.World(size, seed).run(on), alone(mix, counts, times))


@pytest.mark.parametrize("losses", [1, 5])
def test_fewer_or_more_lanes_than_losses_change_nothing(virtual, losses):
    def on(transport):
        way, model = Gather(transport, Options(checks=math.inf)), Model(UNEVEN, transport.rank)
        features = model.features(lambda text: way.announce(text, losses))
        loss = total("all", Pairs(features, way, model.ids))
        loss.backward()
        return [loss.detach(), *model.gradients()]

    assert_equal(virtual.World(4).run(on), alone("all", UNEVEN))


@pytest.mark.parametrize("mix", MIXES)
def test_messages_travel_while_the_image_tower_works(virtual, mix):
    """Columns leave before its forward and gradients before its backward; both are waited for afterwards."""
    world = virtual.World(3)

    def on(transport):
        def told(event):
            return lambda *_: world.note(transport.rank, event)

        way, model = Gather(transport, Options(checks=0)), Model(EVEN[:3], transport.rank)
        features = model.features(lambda text: way.announce(text, len(MIXES[mix])), told("image backward"))
        told("image forward")()
        total(mix, Pairs(features, way, model.ids)).backward()

    world.run(on)
    for rank in range(3):
        events = [event for who, event in world.events if who == rank]
        assert events.index("post all_gather") < events.index("image forward") < events.index("wait all_gather")
        backward = events.index("image backward")
        returned = [n for n, event in enumerate(events) if event == "post reduce_scatter"]
        waited = [n for n, event in enumerate(events) if event == "wait reduce_scatter"]
        assert len(returned) == len(waited) == len(MIXES[mix])
        assert max(returned) < backward < min(waited)


def test_without_an_announcement_the_gradient_is_there_when_it_is_handed_over(virtual):
    world = virtual.World(3)

    def on(transport):
        way, model = Gather(transport, Options(checks=0)), Model(EVEN[:3], transport.rank)
        features = model.features(lambda text: text, lambda _: world.note(transport.rank, "image backward"))
        total("clip", Pairs(features, way, model.ids)).backward()

    world.run(on)
    for rank in range(3):
        events = [event for who, event in world.events if who == rank]
        assert events.index("wait reduce_scatter") < events.index("image backward")


@pytest.mark.parametrize("mix", ["clip", "siglip"])
@pytest.mark.parametrize("frozen", ["image_tower", "text_tower", "scale"])
def test_frozen_parts_with_announced_columns(virtual, mix, frozen):
    """With the image tower frozen the scale takes its gradient from the columns, which must then have arrived."""

    def run(model, way, announce):
        getattr(model, frozen).requires_grad_(False)
        loss = total(mix, Pairs(model.features(announce), way, model.ids))
        loss.backward()
        return [loss.detach(), *model.gradients()]

    def on(transport):
        way = Gather(transport, Options(checks=0))
        return run(Model(EVEN, transport.rank), way, lambda text: way.announce(text, 1))

    wanted = run(Model(EVEN, None), Local(Alone()), lambda text: text)
    assert_equal(virtual.World(4).run(on), wanted)


@pytest.mark.parametrize("accumulators", [None, torch.bfloat16])
def test_gradients_that_are_cast_are_waited_for(virtual, accumulators):
    """bf16 features, or sums in bf16: autograd casts what it is handed, which must be there."""

    def on(transport):
        way = Gather(transport, Options(checks=0, accumulators=accumulators))
        model = Model(EVEN, transport.rank, torch.bfloat16 if accumulators is None else torch.float32)
        features = model.features(lambda text: way.announce(text, 1))
        total("clip", Pairs(features, way, model.ids)).backward()
        return [gradient.double() for gradient in model.gradients()]

    found = [sum(parts) / 4 for parts in zip(*virtual.World(4).run(on), strict=True)]
    for one, two in zip(found, alone("clip", EVEN)[1:], strict=True):
        assert (one - two).norm() <= 0.05 * two.norm()


def test_evaluation_with_announced_columns(virtual):
    def on(transport):
        way, model = Gather(transport, Options(checks=0)), Model(EVEN, transport.rank)
        with torch.no_grad():
            features = model.features(lambda text: way.announce(text, 1))
            return ops.symmetric_cross_entropy(Pairs(features, way, model.ids)).sum()

    model = Model(EVEN, None)
    wanted = ops.symmetric_cross_entropy(Pairs(model.features(lambda text: text), Local(Alone()))).sum()
    assert torch.allclose(sum(virtual.World(4).run(on)), wanted, rtol=1e-10)


def test_a_batch_that_nobody_announced_is_brought(virtual):
    """An announcement belongs to its own tensor, and to no other of the same shape."""

    def on(transport):
        way = Gather(transport, Options(checks=0))
        way.bring(way.announce(torch.full((2, D), 5.0))).spread(torch.zeros(2))
        announced = way.announce(torch.zeros(2, D))
        (block,) = way.bring(torch.ones(2, D)).blocks()
        (other,) = way.bring(announced).blocks()
        return block.columns.mean().item(), other.columns.mean().item()

    world = virtual.World(2)
    with pytest.raises(virtual.HazardError, match="never waited for"):  # the first announcement
        world.run(on)


def test_a_problem_after_the_announcement_is_told_to_every_rank(virtual):
    """Text may be right and the scale wrong: on one rank only, while batches are compared."""

    def on(transport):
        way = Gather(transport, Options(checks=1))
        text = way.announce(torch.ones(2, D))
        checking = way.checking
        try:
            way.bring(text, "scale is nan" if transport.rank == 1 else None)
        except ValueError as error:
            return checking, way.checking, str(error)
        finally:
            way._announced[1].cargo[0].work.wait()

    assert virtual.World(3).run(on) == [(True, False, "rank 1: scale is nan")] * 3


def test_nothing_of_a_batch_is_kept_once_its_losses_have_theirs(virtual):
    def on(transport):
        way, model = Gather(transport, Options(checks=0)), Model(EVEN[:2], transport.rank)
        features = model.features(lambda text: way.announce(text, 2))
        loss = total("both", Pairs(features, way, model.ids))
        kept = way._announced
        loss.backward()
        return kept

    assert virtual.World(2).run(on) == [(None, None, [])] * 2
