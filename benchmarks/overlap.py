"""How much of an exchange hides behind compute: one rank of W, its real kernels, and links that are emulated.

For each exchange: seconds of compute alone, of its messages alone, of both, and from these

    overlap     (compute + messages - both) / min(compute, messages)     1: the shorter is hidden
    contention  both / max(compute, messages)                            1: neither slows the other

A GPU's NVLink is a throttled copy by a few of its processors, its network card a copy to the host and back; a CPU's
link is a thread that sleeps. Then the cost model: fitted on two thirds of measured shapes, judged on the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import emulated, fit, measure, rectangles, report
from benchmarks.emulated import EmulatedTransport, InstantLink, Link, Recorder, SleepingLink
from benchmarks.measure import Call
from benchmarks.report import Budget, Record, Report
from pretrain import exchange, named
from pretrain.exchange.base import Exchange
from pretrain.exchange.trip import Options
from pretrain.objectives.ops import symmetric_cross_entropy
from pretrain.plan.hardware import H100
from pretrain.plan.loss import forward_flops
from pretrain.values import Features, Pairs

SHOWN = ("compute_seconds", "messages_seconds", "both_seconds", "overlap", "contention", "sent_bytes")
PROGRAMS = (8, 16, 24, 32)
"""Processors that NCCL may take."""


@dataclass(frozen=True)
class Setting:
    """W ranks of b rows."""

    ranks: int
    rows: int
    width: int
    layers: int
    """Of the stand-in for an image tower."""
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def main(argv: Sequence[str] | None = None) -> list[Record]:
    cuda = torch.cuda.is_available()
    parser = report.Parser("overlap", __doc__)
    parser.add_argument("--ranks", type=int, default=8 if cuda else 4)
    parser.add_argument("--rows", type=int, nargs="+", default=(1024, 8192) if cuda else (512,), help="of a rank")
    parser.add_argument("--width", type=int, default=512 if cuda else 128)
    parser.add_argument("--layers", type=int, default=24 if cuda else 8, help="of the stand-in for an image tower")
    parser.add_argument("--exchanges", nargs="+", default=[name for name in exchange.names() if name != "local"])
    parser.add_argument("--link-gb-s", type=float, default=0.1, help="of the sleeping link of a CPU")
    asked = parser.read(argv)
    device = torch.device("cuda" if cuda else "cpu")
    taken = Report.of("overlap", asked)
    taken.add(model_records(device, taken.budget, asked.rounds, asked.width))
    for link, rows in product(links(device, asked.link_gb_s), asked.rows):
        setting = Setting(asked.ranks, rows, asked.width, asked.layers, device)
        for case, step in steps(setting, link, asked.exchanges):
            if taken.budget.allows(case, seconds=3 if cuda else 0):
                taken.add(compare(case, step, link, asked.rounds, device))
    return taken.finish(SHOWN)


def links(device: torch.device, gb_per_s: float) -> Iterator[Link]:
    """What there is to emulate with."""
    if device.type != "cuda":
        yield SleepingLink(1e9 * gb_per_s)
        return
    yield emulated.nvlink(*throttled(H100.inside.bytes_per_s, device))
    yield emulated.card()


Step = Callable[[Link], tuple[Call, Callable[[], int]]]
"""A link -> one step over it, and the bytes that left the rank so far."""


def steps(setting: Setting, link: Link, names: Sequence[str]) -> Iterator[tuple[str, Step]]:
    """A single hop posted before and after compute; every exchange; gather behind a stand-in for a tower."""
    size = f"W={setting.ranks} b={setting.rows} d={setting.width} {link.name}"
    for when in ("before", "after"):
        yield f"emulated hop posted {when} compute, {size}", partial(hop_step, setting, when == "before")
    for name in names:
        yield f"emulated {name}, {size}", partial(loss_step, setting, name, 0)
    if "gather" in names:
        yield f"emulated gather behind a tower, {size}", partial(loss_step, setting, "gather", setting.layers)


def compare(case: str, step: Step, link: Link, rounds: int, device: torch.device) -> list[Record]:
    """Compute, messages and both, in turns."""
    recorder = Recorder(link)
    recorded, sent = step(recorder)
    recorded()  # the first batch is also compared between ranks
    before, recorder.moves[:] = sent(), []
    recorded()
    sent_bytes = sent() - before
    calls = {"compute": step(InstantLink())[0], "messages": recorder.repeat, "both": step(link)[0]}
    times = {name: timing.median for name, timing in measure.interleaved(calls, rounds, device).items()}
    compute, messages, both = (times[name] for name in calls)
    record = partial(Record, "overlap", case)
    return [
        *(record(f"{name}_seconds", value, "s") for name, value in times.items()),
        record("overlap", (compute + messages - both) / min(compute, messages), "1"),
        record("contention", both / max(compute, messages), "1"),
        record("sent_bytes", sent_bytes, "B"),
    ]


def hop_step(setting: Setting, first: bool, link: Link) -> tuple[Call, Callable[[], int]]:
    """One rank's block to the next, and one block's logits, the message posted before or after the compute."""
    image, text = (measure.unit_rows(setting.rows, setting.width, setting.device, setting.dtype, n) for n in (1, 2))
    transport, coming = EmulatedTransport(2, link, setting.device), torch.empty_like(text)

    def call() -> None:
        if first:
            work = transport.swap([(text, 1)], [(coming, 1)])
        for _ in range(2 * setting.ranks):
            torch.mm(image, text.t())
        if not first:
            work = transport.swap([(text, 1)], [(coming, 1)])
        work.wait()

    return call, lambda: transport.sent


def loss_step(setting: Setting, name: str, layers: int, link: Link) -> tuple[Call, Callable[[], int]]:
    """Forward and backward of the loss over an exchange, its texts announced before an image tower of some layers."""
    kind: type[Exchange] = named.find(sys.modules[exchange.__name__], name, Exchange)
    node_size = max(1, setting.ranks // 2)
    way = kind(EmulatedTransport(setting.ranks, link, setting.device), Options(node_size=node_size))
    image, text = (
        measure.unit_rows(setting.rows, setting.width, setting.device, setting.dtype, n).requires_grad_()
        for n in (1, 2)
    )
    scale = torch.tensor(14.3, device=setting.device, requires_grad=True)
    tower = Tower(setting, layers)

    def call() -> None:
        announced = way.announce(text * 1)
        pairs = Pairs(Features(tower(image), announced, scale), way)
        pairs.mean(symmetric_cross_entropy(pairs)).backward()
        for tensor in (image, text, scale, *tower.weights):
            tensor.grad = None

    return call, lambda: way.sent


class Tower:
    """Matrix products that take as long as an image tower might, and change nothing much."""

    def __init__(self, setting: Setting, layers: int) -> None:
        wide = 4 * setting.width
        shapes = [(setting.width, wide), (wide, setting.width)] * layers
        self.weights = [
            measure.unit_rows(*shape, setting.device, setting.dtype, n).requires_grad_()
            for n, shape in enumerate(shapes)
        ]

    def __call__(self, rows: Tensor) -> Tensor:
        for up, down in zip(self.weights[::2], self.weights[1::2], strict=True):
            rows = F.normalize(rows + rows @ up @ down, dim=1)
        return rows


def throttled(target: float, device: torch.device) -> tuple[int, int]:
    """Processors and delay with which the copy moves `target` bytes per second: the fewest that can."""
    from benchmarks.throttled_copy import throttled_copy  # triton is for GPUs only

    size = 1 << 26
    source = torch.zeros(size // 4, device=device)
    copied, delay = torch.empty_like(source), torch.zeros(2, device=device)

    def rate(programs: int, spin: int) -> float:
        call = partial(throttled_copy, copied, source, programs, spin, delay)
        return size / measure.interleaved({"copy": call}, 5, device)["copy"].median

    programs = next((count for count in PROGRAMS if rate(count, 0) >= target), PROGRAMS[-1])
    return programs, slowed(partial(rate, programs), target)


def slowed(rate: Callable[[int], float], target: float) -> int:
    """The smallest delay, within a few per cent, that brings a rate down to a target."""
    low, high = 0, 1
    if rate(0) <= target:
        return 0
    while rate(high) > target:
        low, high = high, 2 * high
    while high - low > max(1, high // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if rate(middle) > target else (low, middle)
    return high


def model_records(device: torch.device, budget: Budget, rounds: int, width: int) -> list[Record]:
    """Rates of the forward sweep and of both as the cost model takes them, and its errors on shapes it has not seen."""
    cuda = device.type == "cuda"
    rows, columns = ((1024, 4096, 8192), (8192, 32768, 131072)) if cuda else ((128, 256, 512), (512, 1024, 2048))
    shapes = [(b, many, d) for b, many, d in product(rows, columns, (512, 768) if cuda else (width,))]
    found = rectangles.grid(shapes, device, replace(budget, seconds=budget.seconds / 2), rounds)
    if len(found) < 6:
        budget.skip("cost model", f"{len(found)} shapes are too few to fit and to judge")
        return []
    records = []
    for sweep, passes in {"forward": 1, "both": 4}.items():
        points = [
            (passes * forward_flops(one.rows, one.columns, one.width), getattr(one, f"{sweep}_s")) for one in found
        ]
        model, errors = fit.held_out(points)
        middle, largest = fit.summary(errors)
        record = partial(Record, "overlap", f"cost model, {sweep}, {len(found)} shapes")
        records += [
            record("rate", model.rate, "FLOP/s"),
            record("start_seconds", model.start, "s"),
            record("median_error_on_unseen_shapes", middle, "1"),
            record("largest_error_on_unseen_shapes", largest, "1"),
        ]
    return records


if __name__ == "__main__":
    report.start(main)
