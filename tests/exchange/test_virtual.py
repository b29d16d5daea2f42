"""Every exchange over messages that take every freedom: one process's loss and gradients, and the bytes of its formula.

The last part shows that these messages do find what is wrong: each exchange there is broken on purpose.
"""

import math
from functools import cache

import pytest
import torch
from torch.nn.functional import normalize

from pretrain import exchange, named, objectives
from pretrain.exchange import Exchange, Options
from pretrain.exchange.hierarchical import Hierarchical, Nodes
from pretrain.exchange.relay import Buffers, Hop
from pretrain.exchange.ring import Around, Ring
from pretrain.exchange.transport import Alone
from pretrain.kernels.softmax_contrastive.loss import Sweep
from pretrain.plan.communication import Case, bytes_sent
from pretrain.values import Features, Pairs

SIZES, D = (1, 2, 3, 4, 5, 8), 4
LONE = [name for name in exchange.names() if name not in ("local", "hierarchical")]
WAYS = [(name, None, size) for name in LONE for size in SIZES]
WAYS += [("hierarchical", node, size) for node in (1, 2, 4) for size in SIZES if size % node == 0]
COUNTS = {"even": [5] * 8, "uneven": [2, 5, 0, 3, 1, 4, 0, 2]}
OBJECTIVES = {
    "clip": ("clip", {}),
    "clip, copies positive": ("clip", {"duplicates": "positives"}),
    "clip, smoothed": ("clip", {"label_smoothing": 0.2}),
    "siglip": ("siglip", {}),
    "siglip, copies ignored": ("siglip", {"duplicates": "ignore"}),
}


def way_of(name, transport, **options):
    kind = named.find(exchange, name, Exchange)
    return kind(transport, Options(**options))


@cache
def batch(count, dtype=torch.float64, width=D):
    generator = torch.Generator().manual_seed(count)
    return [normalize(torch.randn(count, width, generator=generator, dtype=dtype), dim=1) for _ in range(2)]


def step(way, rows, count, objective, scale=7.0, dtype=torch.float64, times=1):
    """Loss, and gradients of images, texts, scale and bias, of some rows."""
    name, options = OBJECTIVES[objective]
    method = objectives.find(name)
    scalars = [torch.tensor(value, dtype=dtype) for value in (scale, -1.0)]
    leaves = [x.clone().requires_grad_() for x in (*(x[rows] for x in batch(count, dtype)), *scalars)]
    ids = torch.arange(count) // 2
    terms = method(method.Options(**options))(Pairs(Features(*leaves), way, ids[rows]))
    loss = torch.stack(list(terms.values())).sum()
    for _ in range(times):
        loss.backward(retain_graph=True)
    return [loss.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


@cache
def alone(count, objective, scale=7.0):
    return step(way_of("local", Alone()), slice(None), count, objective, scale)


def rank_rows(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def averaged(found):
    """What an engine makes of the ranks' results."""
    size = len(found)
    loss, images, texts, scale, bias = zip(*found, strict=True)
    return [sum(loss) / size, torch.cat(images) / size, torch.cat(texts) / size, sum(scale) / size, sum(bias) / size]


def assert_equal(found, wanted):
    for name, one, two in zip(("loss", "images", "texts", "scale", "bias"), averaged(found), wanted, strict=True):
        assert one.shape == two.shape
        difference = (one - two).abs().max() / max(1e-3, two.abs().max())
        assert difference < 1e-10, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize(
    ("layout", "objective"),
    [*(("uneven", objective) for objective in OBJECTIVES), ("even", "clip"), ("even", "siglip")],
)
@pytest.mark.parametrize(("name", "node", "size"), WAYS)
def test_ranks_equal_one_process(virtual, name, node, size, layout, objective):
    counts = COUNTS[layout][:size]

    def on(transport):
        way = way_of(name, transport, node_size=node, checks=math.inf)
        return step(way, rank_rows(counts, transport.rank), sum(counts), objective)

    for seed in range(2):
        assert_equal(virtual.World(size, seed).run(on), alone(sum(counts), objective))


@pytest.mark.parametrize("objective", ["clip", "siglip"])
@pytest.mark.parametrize(("name", "node", "size"), [way for way in WAYS if way[2] == 4])
def test_backward_twice_gives_twice_the_gradient(virtual, name, node, size, objective):
    counts = COUNTS["uneven"][:size]

    def on(transport):
        way = way_of(name, transport, node_size=node, checks=math.inf)
        return step(way, rank_rows(counts, transport.rank), sum(counts), objective, times=2)

    loss, *gradients = alone(sum(counts), objective)
    assert_equal(virtual.World(size).run(on), [loss, *(2 * gradient for gradient in gradients)])


@pytest.mark.parametrize(("name", "node", "size"), [way for way in WAYS if way[2] in (3, 4)])
def test_shifts_of_their_own_travel_too(virtual, monkeypatch, name, node, size):
    """At this scale no common shift suits, and every sweep is a walk of its own."""
    counts, fell_back, tracked = COUNTS["uneven"][:size], [], Sweep._tracked_sums
    monkeypatch.setattr(Sweep, "_tracked_sums", lambda sweep: fell_back.append(True) or tracked(sweep))

    def on(transport):
        way = way_of(name, transport, node_size=node, checks=math.inf)
        return step(way, rank_rows(counts, transport.rank), sum(counts), "clip", scale=3000.0)

    assert_equal(virtual.World(size).run(on), alone(sum(counts), "clip", 3000.0))
    assert len(fell_back) >= size


@pytest.mark.parametrize("layout", COUNTS)
@pytest.mark.parametrize(("name", "node", "size"), WAYS)
def test_every_column_comes_once_and_its_number_and_partner_are_told(virtual, name, node, size, layout):
    counts = COUNTS[layout][:size]
    columns = torch.arange(sum(counts), dtype=torch.float32)[:, None].expand(-1, 2)

    def on(transport):
        rows = rank_rows(counts, transport.rank)
        way = way_of(name, transport, node_size=node, checks=math.inf, slices=3)
        return [walk(way.bring(columns[rows]), rows.start) for _ in range(2)]

    for rounds in virtual.World(size).run(on):
        for seen, partners in rounds:
            assert sorted(seen) == list(range(sum(counts)))
            assert all(row == column for row, column in partners)
    assert sum(len(rounds[0][1]) for rounds in virtual.World(size, 1).run(on)) == sum(counts)


def walk(trip, first):
    """The numbers of all columns in the order in which they came, and pairs of (own row, its partner's number)."""
    seen, partners = [], []
    for block in trip.blocks():
        assert len(block.columns)
        assert isinstance(block.numbers, slice) or block.numbers.dtype == torch.int64
        numbers = torch.arange(trip.count)[block.numbers].tolist()
        assert block.columns[:, 0].tolist() == numbers
        seen += numbers
        span = block.span
        own = numbers[span.column : span.column + span.count]
        partners += zip(range(first + span.row, first + span.row + span.count), own, strict=True)

    def share(block):
        assert len(block.columns)
        return torch.ones(block.columns.shape)

    trip.collect(share).take(torch.tensor(1.0))
    return seen, partners


@pytest.mark.parametrize("objective", ["clip", "siglip"])
@pytest.mark.parametrize(("name", "node", "size"), WAYS)
def test_bytes_are_those_of_the_closed_form(virtual, name, node, size, objective):
    case = Case(size, 5, D, bytes_each=4, node_size=node or 8)

    def on(transport):
        way = way_of(name, transport, node_size=node, checks=0)
        step(way, rank_rows(COUNTS["even"], transport.rank), 5 * size, objective, dtype=torch.float32)
        return way.sent

    assert set(virtual.World(size).run(on)) == {bytes_sent(name, case, objective)}


@pytest.mark.parametrize("accumulators", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "node", "size"), WAYS)
def test_bytes_of_each_sweep(virtual, name, node, size, accumulators):
    """(W - 1) b D numbers with columns alone, and as many in the accumulators' dtype with gradients."""

    def on(transport):
        way = way_of(name, transport, node_size=node, checks=0, accumulators=accumulators)
        trip, sent = way.bring(torch.ones(6, D, dtype=torch.float16)), []
        for sweep in ("columns", "gradients"):
            before = way.sent
            if sweep == "columns":
                list(trip.blocks())
            else:
                gradient = trip.collect(lambda block: torch.ones(block.columns.shape)).take(torch.tensor(2.0))
                assert torch.equal(gradient, torch.full((6, D), 2.0 * size))
            sent.append(way.sent - before)
        return tuple(sent)

    numbers = (size - 1) * 6 * D
    again = 0 if name == "gather" else 2 * numbers  # which keeps the columns
    assert set(virtual.World(size).run(on)) == {(2 * numbers, again + accumulators.itemsize * numbers)}


def test_hierarchical_sends_little_between_nodes(virtual):
    def on(transport):
        way = way_of("hierarchical", transport, node_size=4, checks=0)
        list(way.bring(torch.ones(6, D)).blocks())
        return way.across.sent, way.inside.sent

    assert set(virtual.World(8).run(on)) == {((2 - 1) * 6 * D * 4, (8 - 2) * 6 * D * 4)}


# Of eight ranks, what is under way while each block is computed: by columns alone, and with gradients.
UNDER_WAY = {
    "streamed": (["a", "a", "a", ""], ["a", "ar", "ar", "r"]),
    "ring": (["s"] * 7 + [""], ["s"] * 8),
    "bidirectional": (["s"] * 7 + [""], ["s"] * 8),
    "hierarchical": (["as", "as", "a", ""], ["as", "ars", "ar", "rs"]),
}


@pytest.mark.parametrize("name", UNDER_WAY)
def test_messages_travel_while_blocks_are_computed(virtual, name):
    """a: all-gather, r: reduce-scatter, s: swap. The last of a sweep's columns have no others to wait for."""
    world = virtual.World(8)

    def under_way(transport):
        kinds = {under.what.rpartition(", ")[2].split()[0] for under in world.pending[transport.thread]}
        return "".join(sorted(kind[0] for kind in kinds))

    def on(transport):
        way = way_of(name, transport, node_size=2, checks=0)
        trip, seen = way.bring(torch.ones(4, D)), []

        def share(block):
            seen.append(under_way(transport))
            return torch.ones(block.columns.shape)

        forward = [under_way(transport) for _ in trip.blocks()]
        trip.collect(share).take(torch.tensor(1.0))
        return forward, seen

    assert world.run(on)[0] == UNDER_WAY[name]


@pytest.mark.parametrize("name", exchange.names())
def test_a_group_exchanges_among_itself(virtual, name):
    """Four ranks in two groups of two, which know nothing of each other."""
    if name == "local":
        pytest.skip("one rank only")

    def on(transport):
        group = transport.split(2)[0]
        way = way_of(name, group, checks=math.inf, node_size=2)
        return step(way, rank_rows([3, 4], group.rank), 7, "clip")

    found = virtual.World(4).run(on)
    assert_equal(found[:2], alone(7, "clip"))
    assert_equal(found[2:], alone(7, "clip"))


class TooEarly(Around):
    def blocks(self):
        columns = self._columns()
        for step in range(self.transport.size):
            hop = Hop(self.transport, [columns] if self._more(step) else [])
            yield self._block(step, columns.here if columns.coming is None else columns.coming)
            hop.wait()


class Scribbling(Around):
    """Computes in place on what it is sending."""

    def blocks(self):
        for block in super().blocks():
            yield block
            block.columns.mul_(2)


class Unwaited(Around):
    def blocks(self):
        yield self._block(0, self.mine)
        Hop(self.transport, [self._columns()])


class OneBuffer(Buffers):
    def next(self, rows, like):
        self._held = self._held or [like.new_empty(rows, *like.shape[1:])]
        return self._held[0][:rows]


class Crowded(Around):
    def _columns(self):
        columns = super()._columns()
        columns.buffers = OneBuffer()
        return columns


class Gathering(Nodes):
    """Lets columns come to where others are still being gathered from."""

    def _gather(self, rows, rooms):
        work, gathered = super()._gather(rows, rooms)
        return Late(work), gathered


class Late:
    """Waited for only once the next block is asked for."""

    def __init__(self, work):
        self.work, self.calls = work, 0

    def wait(self):
        self.calls += 1


class Silent(Around):
    """Its second rank receives nothing."""

    def blocks(self):
        yield self._block(0, self.mine)
        neighbour = self._neighbours()[0]
        receives = [] if self.transport.rank == 1 else [(torch.empty_like(self.mine), self._neighbours()[1])]
        self.transport.swap([(self.mine, neighbour)], receives).wait()


class Disordered(Around):
    """Even ranks send before they add up, odd ones after."""

    def blocks(self):
        hops = [lambda: Hop(self.transport, [self._columns()]).wait(), lambda: self.sum(torch.ones(2))]
        for hop in hops if self.transport.rank % 2 else reversed(hops):
            hop()
        yield self._block(0, self.mine)


HAZARDS = {
    Scribbling: "changed what it was sending",
    Unwaited: "never waited for",
    Crowded: "uses memory of .* before it was waited for",
    Silent: "do not send each other what they expect",
    Disordered: "posts operation 0 .* where .* posted",
}


@pytest.mark.parametrize("broken", HAZARDS)
def test_a_broken_exchange_is_found(virtual, broken):
    class Broken(Ring):
        trip = broken

    def on(transport):
        for block in Broken(transport, Options(checks=0)).bring(torch.ones(6, D)).blocks():
            block.columns.sum()

    with pytest.raises(virtual.HazardError, match=HAZARDS[broken]):
        virtual.World(4).run(on)


def test_what_has_not_arrived_is_nan(virtual):
    class Broken(Ring):
        trip = TooEarly

    def on(transport):
        return [block.columns.isnan().all().item() for block in Broken(transport).bring(torch.ones(6, D)).blocks()]

    assert virtual.World(4).run(on) == [[True, True, True, False]] * 4


def test_columns_that_arrive_where_others_are_gathered_from_are_found(virtual):
    class Broken(Hierarchical):
        def depart(self, columns, layout):
            return Gathering(columns, layout, self.transport, self.options, inside=self.inside, across=self.across)

    def on(transport):
        list(Broken(transport, Options(checks=0, node_size=2)).bring(torch.ones(6, D)).blocks())

    with pytest.raises(virtual.HazardError, match=r"uses memory of .* before it was waited for"):
        virtual.World(8).run(on)


def test_a_rank_that_fails_ends_the_others(virtual):
    def on(transport):
        if transport.rank == 1:
            raise RuntimeError("out of memory")
        list(Ring(transport).bring(torch.ones(6, D)).blocks())

    with pytest.raises(RuntimeError, match="out of memory"):
        virtual.World(3).run(on)
