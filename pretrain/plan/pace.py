"""Seconds of one step: what a GPU computes, and which messages it waits for.

towers      products / rate + attention / rate + moved bytes / rate, or the host's calls where they take longer
loss        its two sweeps over all columns
exchange    what its messages take beyond the loss's compute; behind the towers only where the step has one part
engine      gradients (and gathered weights) beyond the passes that they hide behind
optimizer   reads and writes of weights, gradients and moments
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.plan import communication
from pretrain.plan.case import Question
from pretrain.plan.memory import bytes_sent, held
from pretrain.plan.work import Spent, Tower

BUCKET_BYTES = 25e6
"""DDP's last bucket: it has no compute left to hide behind."""
FUSED = 0.45
"""Share of the bytes moved that is left when the compiler has joined operators: an assumption."""
AVERAGE_BYTES = 12
"""Moved for each number of a moving average."""


@dataclass(frozen=True)
class Pace:
    """Seconds."""

    image: float
    text: float
    loss: float
    optimizer: float
    exchange: float
    """Exposed."""
    engine: float
    """Exposed."""

    @property
    def compute(self) -> float:
        return self.image + self.text + self.loss + self.optimizer

    @property
    def step(self) -> float:
        return self.compute + self.exchange + self.engine


def pace(ask: Question, exchange: str) -> Pace:
    """Of a step of the global batch, on each GPU at the same time."""
    loss = sum(communication.compute_s(ask.columns, ask.gpu.machine)) * (6 / 8 if ask.loss == "siglip" else 1)
    return Pace(
        image=_tower(ask, ask.work.image, ask.work.image_rows),
        text=_tower(ask, ask.work.text, ask.work.text_rows),
        loss=loss,
        optimizer=_optimizer(ask),
        exchange=exposed(ask, exchange),
        engine=_engine(ask),
    )


def exposed(ask: Question, exchange: str) -> float:
    """Seconds that an exchange's messages add to a step; the cached-feature step has no tower to hide them behind."""
    if ask.gpus == 1:
        return 0.0
    whole = communication.seconds(exchange, ask.columns, ask.gpu.machine, hidden=ask.parts == 1)
    return max(0.0, whole - sum(communication.compute_s(ask.columns, ask.gpu.machine)))


def seconds(ask: Question, spent: Spent, rows: int) -> float:
    """Of operators on so many rows."""
    gpu, peak = ask.gpu, ask.gpu.peak(ask.run.model.precision)
    compiled = any(entry.startswith(("compile", "cuda_graphs")) for entry in ask.run.model.speed)
    moved = spent.moved.at(rows) * (FUSED if compiled else 1.0) / (gpu.moving * gpu.memory_bytes_per_s)
    products = spent.products.at(rows) / (gpu.products * peak) + spent.attention.at(rows) / (gpu.attention * peak)
    called = 0.0 if "cuda_graphs" in ask.run.model.speed else spent.calls.at(rows) * gpu.call_s
    return max(products + moved, called * (FUSED if compiled else 1.0))


def passes(ask: Question, tower: Tower, rows: int) -> tuple[float, float]:
    """Seconds forward (all parts, both times where there are several) and backward of one tower."""
    each = ask.micro * rows
    forward = seconds(ask, tower.forward, each)
    backward = max(0.0, seconds(ask, tower.whole, each) - forward)
    if ask.efficiency is not None:
        peak = ask.efficiency * ask.gpu.peak(ask.run.model.precision)
        flops = [spent.products.at(each) + spent.attention.at(each) for spent in (tower.forward, tower.whole)]
        forward, backward = flops[0] / peak, (flops[1] - flops[0]) / peak
    share = ask.rows / ask.micro  # the last part may be smaller
    return forward * share * (2 if ask.parts > 1 else 1), backward * share


def _tower(ask: Question, tower: Tower, rows: int) -> float:
    return sum(passes(ask, tower, rows))


def _optimizer(ask: Question) -> float:
    """Weights, gradients and moments read, weights and moments written, gradients read once more for their norm."""
    sizes, layout = ask.work.sizes, ask.layout
    kept = held(sizes, layout, ask.run.optim.name)
    share = layout.sharers if layout.stage else 1
    numbers = 4 * sizes.total / share
    average = AVERAGE_BYTES / 4 * numbers if ask.run.optim.ema_decay is not None else 0.0
    moved = 2 * (numbers + kept.moments) + 2 * numbers + average
    return moved / (ask.gpu.moving * ask.gpu.memory_bytes_per_s)


def _engine(ask: Question) -> float:
    """What is sent for weights and gradients, less the passes that run meanwhile."""
    if ask.gpus == 1:
        return 0.0
    layout, sizes = ask.layout, ask.work.sizes
    link = ask.gpu.machine.collective(ask.gpus, ask.node_size)
    sent = link.seconds(bytes_sent(sizes, layout, ask.parts))
    both = [passes(ask, tower, rows) for tower, rows in ask.work.towers]
    forward, backward = sum(times[0] for times in both), sum(times[1] for times in both)
    if layout.stage < 3:  # gradients travel behind the last part's backward pass alone
        apart = link.seconds(4 * sizes.total) if layout.stage else 0.0  # updated weights, told to all
        last = min(BUCKET_BYTES, layout.reduce_bytes * sizes.total)
        return apart + max(sent - apart - backward / ask.parts, link.seconds(2 * last))
    first = link.seconds(layout.gather_bytes * sizes.largest_units / 2)
    return max(sent - forward - backward, first)
