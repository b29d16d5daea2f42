"""The prediction for one number of GPUs, what fits into them, and which engine and exchange to take."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import UserError
from pretrain.plan import communication
from pretrain.plan.case import Question, Stage
from pretrain.plan.choice import EXCHANGES, Choice, choose_exchange, serves
from pretrain.plan.footprint import Footprint, footprint
from pretrain.plan.memory import bytes_sent
from pretrain.plan.pace import Pace, exposed, pace

GIB = 1 << 30
_STAGES: tuple[Stage, ...] = (1, 2, 3)
CLEARLY = 0.95
"""Of the fastest engine's samples a second: what is nearer to it than this is as good."""


@dataclass(frozen=True)
class Prediction:
    """Of a step, under one engine and one exchange. Bytes and seconds are those of one GPU."""

    gpus: int
    pairs_per_gpu: int
    micro_batch: int
    parts: int
    engine: str
    exchange: str
    fits: bool
    memory: Footprint
    pace: Pace
    step_s: float
    samples_per_s: float
    mfu: float
    """FLOP of the towers that a step needs, by what the GPUs' data sheets promise in its time."""
    bytes_sent_exchange: int
    bytes_sent_engine: int


@dataclass(frozen=True)
class Way:
    """An exchange or an engine beside the others."""

    name: str
    exposed_s: float
    memory_bytes: float
    bytes_sent: int
    parts: Footprint | None = None
    """Engines: what `memory_bytes` holds, in that pass."""
    largest_micro_batch: int | None = None
    """Engines: pairs of the largest pass that fits; 0: none does."""
    samples_per_s: float | None = None
    """Engines: with that pass."""


def predict(ask: Question) -> Prediction:
    """What the config does as it stands.

    Raises:
        UserError: engine or exchange cannot carry so many GPUs, or is none of this project's.
    """
    refuse(ask)
    exchange = exchange_of(ask)
    memory, times = footprint(ask, exchange), pace(ask, exchange)
    rate = ask.rows * ask.gpus / times.step
    peak = ask.gpu.peak(ask.run.model.precision) * ask.gpus
    sent = communication.bytes_sent(exchange, ask.columns, ask.loss)
    return Prediction(
        ask.gpus, ask.rows, ask.micro, ask.parts, ask.engine, exchange, memory.peak <= ask.gpu.usable_bytes, memory,
        times, times.step, rate, rate * ask.work.flops / peak, sent, bytes_sent(ask.work.sizes, ask.layout, ask.parts),
    )  # fmt: skip


def refuse(ask: Question) -> None:
    """UserError: the engine or exchange does not suit the number of GPUs."""
    if (ask.engine == "single") != (ask.gpus == 1):
        raise UserError(f"engine {ask.engine} does not carry {ask.gpus} GPUs: set engine: auto")
    named = ask.run.exchange
    if named not in ("auto", "local", *EXCHANGES):
        raise UserError(f"exchange {named}: cannot be planned; one of {', '.join(EXCHANGES)}")
    if named != "auto" and ask.gpus > 1 and (named == "local" or not serves(named, ask.columns)):
        raise UserError(f"exchange {named} does not serve {ask.gpus} GPUs in nodes of {ask.node_size}: set it to auto")


def exchange_of(ask: Question) -> str:
    """As the config names it, or as auto chooses."""
    if ask.gpus == 1:
        return "local"
    return ask.run.exchange if ask.run.exchange != "auto" else chosen_exchange(ask).name


def chosen_exchange(ask: Question) -> Choice:
    case = ask.columns
    return choose_exchange(
        ranks=case.ranks, rows=case.rows, width=case.width, node_size=case.node_size, bytes_each=case.bytes_each,
        slices=case.slices, machine=ask.gpu.machine, memory_bytes=ask.run.loss.memory_gb * GIB,
    )  # fmt: skip


def exchanges(ask: Question) -> list[Way]:
    """Every exchange that serves these GPUs."""
    case = ask.columns
    return [
        Way(
            name,
            exposed(ask, name),
            communication.memory_bytes(name, case),
            communication.bytes_sent(name, case, ask.loss),
        )
        for name in EXCHANGES
        if ask.gpus > 1 and serves(name, case)
    ]


def engines(ask: Question) -> list[Way]:
    """Engines that could carry the run, each with the largest pass that fits; the config's own comes first."""
    if ask.gpus == 1:
        return [_engine(ask.under("single"))]
    cases = [ask.under(ask.engine, ask.run.parallel.zero_stage), ask.under("ddp"), ask.under("fsdp2")]
    cases += [ask.under("deepspeed", stage) for stage in _STAGES]
    return [_engine(case) for case in {engine_name(case): case for case in reversed(cases)}.values()][::-1]


def engine_name(ask: Question) -> str:
    """With the stage, where there are stages."""
    return f"{ask.engine} zero{ask.layout.zero_stage}" if ask.engine == "deepspeed" else ask.engine


def _engine(ask: Question) -> Way:
    largest = largest_micro_batch(ask)
    tried = ask.with_run(micro_batch=largest or 1)
    memory, times = footprint(tried, exchange_of(tried)), pace(tried, exchange_of(tried))
    sent = bytes_sent(ask.work.sizes, tried.layout, tried.parts)
    rate = ask.rows * ask.gpus / times.step
    return Way(engine_name(ask), times.engine, memory.peak, sent, memory, largest, rate)


def largest_micro_batch(ask: Question) -> int:
    """Pairs of the largest pass that fits, the whole rank's if they do; 0: not even one does."""

    def fits(pairs: int) -> bool:
        tried = ask.with_run(micro_batch=pairs)
        return footprint(tried, exchange_of(tried)).peak <= ask.gpu.usable_bytes

    if fits(ask.rows):
        return ask.rows
    low, high = 0, ask.rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def advice(ask: Question) -> tuple[str, ...]:
    """Which engine, which pass and which exchange, and why: a sentence each."""
    ways = engines(ask)
    able = [way for way in ways if way.largest_micro_batch]
    if not able:
        needs = min(way.memory_bytes for way in ways) / 1e9
        room = ask.gpu.usable_bytes / 1e9
        return (f"does not fit: a pass of one pair takes {needs:.3g} of {room:.3g} GB; take more GPUs or larger ones",)
    best = _best(able)
    fastest = max(able, key=_rate)
    why = "" if best is fastest else f", within {1 - CLEARLY:.0%} of {fastest.name}, and the simplest"
    others = [f"{way.name} {way.samples_per_s or 0:,.0f} samples/s" for way in able if way is not best]
    others += [f"{way.name} does not fit" for way in ways if way not in able]
    said = f"engine {best.name}: {best.samples_per_s:,.0f} samples/s{why}" + (
        f" ({'; '.join(others)})" if others else ""
    )
    sentences = [said, _pass(ask, best)]
    if ask.gpus > 1:
        choice = chosen_exchange(ask)
        sentences.append(f"exchange {choice.name}: {choice.reason}")
    return tuple(sentences)


def _best(able: list[Way]) -> Way:
    """The simplest of those that no other clearly outruns: what keeps everything on each rank, then torch's own."""
    fastest = max(map(_rate, able))
    good = [way for way in able if _rate(way) >= CLEARLY * fastest]
    simple = {way.name: way for way in reversed(good)}
    return next((simple[name] for name in ("single", "ddp", "fsdp2") if name in simple), max(good, key=_rate))


def _rate(way: Way) -> float:
    return way.samples_per_s or 0.0


def _pass(ask: Question, best: Way) -> str:
    largest = best.largest_micro_batch or 0
    if largest >= ask.rows:
        return f"micro_batch: none is needed, all {ask.rows} pairs of a GPU fit at once under {best.name}"
    even = -(-ask.rows // -(-ask.rows // largest))
    again = f"the {-(-ask.rows // largest)} passes of a step run the towers forward twice"
    return f"micro_batch {even}: at most {largest} of a GPU's {ask.rows} pairs fit under {best.name}, and {again}"
