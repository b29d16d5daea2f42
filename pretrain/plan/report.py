"""A whole plan, as data and as text. Every number in it is predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pretrain.plan.case import Question
from pretrain.plan.feed import DECODED, MEASURED_ON, cores
from pretrain.plan.predict import Prediction, Way, advice, engines, exchanges, largest_micro_batch, predict
from pretrain.plan.scaling import Point, same_batch, same_share

Row = Sequence[str]


@dataclass(frozen=True)
class Cost:
    """Of the whole run; None where its length in samples is not known."""

    samples: int | None
    hours: float | None
    gpu_hours: float | None
    usd: float | None


@dataclass(frozen=True)
class Plan:
    """What `pretrain plan` found."""

    label: str
    config: str
    model: str
    gpu: str
    parameters: dict[str, int]
    flops_per_sample: dict[str, float]
    """Forward and backward of each tower, and of the pair."""
    step: Prediction
    largest_micro_batch: int
    exchanges: list[Way]
    engines: list[Way]
    run: Cost
    cpu_cores: dict[str, int]
    """That decode as fast as the GPUs train, by the size of stored images."""
    advice: tuple[str, ...]
    same_batch: list[Point]
    same_share: list[Point]
    assumptions: tuple[str, ...]


def plan(ask: Question, price: float | None = None) -> Plan:
    """Everything about one question.

    Args:
        price: USD an hour and GPU; None: the table's.

    Raises:
        UserError: as `predict`.
    """
    step, work = predict(ask), ask.work
    tower_flops = {f"{tower.name} {way}": tower.model_flops[n] for tower, _ in reversed(work.towers)
                   for n, way in enumerate(("forward", "backward"))}  # fmt: skip
    return Plan(
        label="predicted",
        config=ask.run.name,
        model=ask.run.model.name,
        gpu=ask.gpu.name,
        parameters={"image": work.image.parameters, "text": work.text.parameters, "all": work.sizes.total},
        flops_per_sample=tower_flops | {"all": work.flops},
        step=step,
        largest_micro_batch=largest_micro_batch(ask),
        exchanges=exchanges(ask),
        engines=engines(ask),
        run=_cost(ask, step, ask.gpu.price if price is None else price),
        cpu_cores={stored: cores(step.samples_per_s, stored) for stored in DECODED},
        advice=advice(ask),
        same_batch=same_batch(ask),
        same_share=same_share(ask),
        assumptions=_assumptions(ask, price),
    )


def _cost(ask: Question, step: Prediction, price: float) -> Cost:
    train, data = ask.run.train, ask.run.data
    samples = train.samples
    if samples is None and train.epochs is not None and data.synthetic is not None:
        samples = int(train.epochs * data.synthetic)
    if samples is None:
        return Cost(None, None, None, None)
    hours = samples / step.samples_per_s / 3600
    return Cost(samples, hours, hours * ask.gpus, hours * ask.gpus * price)


def _assumptions(ask: Question, price: float | None) -> tuple[str, ...]:
    gpu, peak = ask.gpu, ask.gpu.peak(ask.run.model.precision)
    reached = (
        f"the towers reach {ask.efficiency:.0%} of {peak / 1e12:.4g} TFLOP/s (--efficiency)"
        if ask.efficiency is not None
        else f"matrix products reach {gpu.products:.0%} of {peak / 1e12:.4g} TFLOP/s, attention {gpu.attention:.0%}, "
        f"other operators {gpu.moving:.0%} of {gpu.memory_bytes_per_s / 1e12:.3g} TB/s"
    )
    found = [
        reached,
        f"links: {gpu.machine.name}; {ask.node_size} GPUs a node",
        f"{gpu.memory_bytes / 1e9:.4g} GB a GPU, {gpu.usable_bytes / 1e9:.4g} of them for tensors",
        f"{gpu.price if price is None else price:.2f} USD an hour and GPU" + ("" if price is None else " (--price)"),
        f"decoding as on {MEASURED_ON}; reading from storage keeps up",
    ]
    if any("clip" not in one.name and "siglip" not in one.name for one in ask.run.objective):
        found.append("every objective but siglip costs what clip costs")
    return (*found, *(f"{entry} is not traced: memory is that without it" for entry in ask.work.assumed))


def text(found: Plan) -> str:
    """For a terminal."""
    parts = [_head(found), _memory(found), _times(found), _ways(found), _whole(found), _scaling(found)]
    assumed = "\n".join(f"  {line}" for line in found.assumptions)
    return "\n\n".join([*parts, "Take\n" + "\n".join(f"  {line}" for line in found.advice), f"Assumed\n{assumed}"])


def _head(found: Plan) -> str:
    step, sizes, flops = found.step, found.parameters, found.flops_per_sample
    runs = f"{step.pairs_per_gpu} pairs a GPU" + (f" in passes of {step.micro_batch}" if step.parts > 1 else "")
    rows = [
        ("", "parameters", "GFLOP a sample, forward", "backward"),
        *((name, f"{sizes[name] / 1e6:.1f} M", *(f"{flops[f'{name} {way}'] / 1e9:.2f}" for way in
          ("forward", "backward"))) for name in ("image", "text")),
    ]  # fmt: skip
    title = f"{found.config}: {found.model} on {step.gpus} {found.gpu}, {runs}, engine {step.engine}, exchange "
    return f"{title}{step.exchange}\nEvery number below is predicted, none measured.\n\n{table(rows)}"


def _memory(found: Plan) -> str:
    memory = found.step.memory
    names = ("weights", "gradients", "optimizer", "gathered", "activations", "batch", "features", "loss")
    rows = [(name, _gb(getattr(memory, name))) for name in names]
    verdict = "fits" if found.step.fits else "DOES NOT FIT"
    rows += [(f"peak, in the {memory.fullest}", f"{_gb(memory.peak)}, {verdict}")]
    rows += [("of it on the host", _gb(memory.host))] if memory.host else []
    return f"Memory of a GPU (largest micro_batch that fits: {found.largest_micro_batch})\n{table(rows)}"


def _times(found: Plan) -> str:
    times, step = found.step.pace, found.step
    rows = [(name, _ms(getattr(times, name))) for name in ("image", "text", "loss", "optimizer")]
    rows += [("exchange, exposed", _ms(times.exchange)), ("engine, exposed", _ms(times.engine))]
    rows += [("step", f"{_ms(step.step_s)}, {step.samples_per_s:,.0f} samples/s, MFU {step.mfu:.1%}")]
    return f"Time of a step\n{table(rows)}"


def _ways(found: Plan) -> str:
    rows: list[Row] = [("exchange", "exposed", "memory", "sent a step")]
    rows += [(way.name, _ms(way.exposed_s), _gb(way.memory_bytes), _gb(way.bytes_sent)) for way in found.exchanges]
    more: list[Row] = [("engine", "exposed", "sent a step", "largest micro_batch", "samples/s")]
    more += [
        (way.name, _ms(way.exposed_s), _gb(way.bytes_sent), str(way.largest_micro_batch), f"{way.samples_per_s:,.0f}")
        for way in found.engines
    ]
    parts: list[Row] = [("memory in that pass", "weights", "gradients", "optimizer", "gathered", "activations", "peak")]
    parts += [
        (
            way.name,
            *map(_gb, (held.weights, held.gradients, held.optimizer, held.gathered, held.activations, held.peak)),
        )
        for way in found.engines
        if (held := way.parts)
    ]
    tables = ([] if len(rows) == 1 else [table(rows)]) + [table(more), table(parts)]
    return "\n\n".join(tables)


def _whole(found: Plan) -> str:
    cost, step = found.run, found.step
    feed = ", ".join(f"{count} for stored images of {size}" for size, count in found.cpu_cores.items())
    fed = f"  CPU cores to feed {step.gpus} GPUs: {feed}"
    if cost.hours is None:
        return f"The run\n  its length is not known: train.samples is not set\n{fed}"
    money = f"{cost.gpu_hours:,.0f} GPU-hours, {cost.usd:,.0f} USD"
    return f"The run\n  {cost.samples:,} samples: {cost.hours:,.1f} hours, {money}\n{fed}"


def _scaling(found: Plan) -> str:
    pairs = found.step.pairs_per_gpu
    sections = [
        (f"The same global batch, {pairs * found.step.gpus}", found.same_batch),
        (f"The same {pairs} pairs a GPU", found.same_share),
    ]
    return "\n\n".join(f"{title}\n{table(scaling_rows(points))}" for title, points in sections if points)


def scaling_rows(points: Iterable[Point]) -> list[Row]:
    rows: list[Row] = [("GPUs", "pairs a GPU", "micro_batch", "exchange", "step", "samples/s", "efficiency", "MFU")]
    for point in points:
        one = point.prediction
        rows.append((str(one.gpus), str(one.pairs_per_gpu), str(one.micro_batch), one.exchange, _ms(one.step_s),
                     f"{one.samples_per_s:,.0f}", f"{point.efficiency:.0%}", f"{one.mfu:.1%}"))  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """Columns under each other, two blanks before each."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
