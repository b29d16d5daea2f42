"""Which exchange a run should take, and why, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.plan import communication
from pretrain.plan.communication import Case
from pretrain.plan.hardware import H100, Machine

EXCHANGES = ("gather", "streamed", "ring", "bidirectional", "hierarchical")
MEMORY_BYTES = 4e9
"""What travelling columns and gradients may take of a GPU, unless the run says otherwise."""
CLEARLY = 0.8
"""A prediction must be below this share of another one to count as faster: links of like clusters differ by as much."""


@dataclass(frozen=True)
class Option:
    """One way, and what it is predicted to cost a rank in a step."""

    name: str
    seconds: float
    bytes_sent: int
    memory_bytes: int


@dataclass(frozen=True)
class Choice:
    """The way to take."""

    name: str
    reason: str
    """One sentence, with the numbers it rests on."""
    alternatives: tuple[Option, ...]
    """Every way that would serve, the chosen one among them."""


def choose_exchange(
    *,
    ranks: int,
    rows: int,
    width: int,
    node_size: int = 8,
    memory_bytes: float = MEMORY_BYTES,
    bytes_each: int = 2,
    slices: int = 4,
    machine: Machine = H100,
    among: Sequence[str] = EXCHANGES,
) -> Choice:
    """The exchange for a batch.

    One rank needs none. Otherwise gather, whose messages hide behind the towers, as long as it fits into memory; then
    streamed, unless a ring is predicted to be clearly faster, or nothing else fits.

    Args:
        ranks: W.
        rows: of one rank.
        width: of the features.
        node_size: ranks that share a node.
        memory_bytes: what columns and gradients of all ranks may take.
        bytes_each: of a travelling number: 2 or 4. Gradients take 4.
        slices: of streamed.
        machine: links and speeds.
        among: the exchanges to choose from.

    Raises:
        ValueError: none of them serves so many ranks.
    """
    case = Case(ranks, rows, width, bytes_each, node_size=node_size, slices=slices)
    if ranks == 1:
        return Choice("local", "one rank holds every column", (_option("local", case, machine),))
    options = tuple(_option(name, case, machine) for name in among if serves(name, case))
    if not options:
        raise ValueError(f"none of {', '.join(among)} serves {ranks} ranks in nodes of {node_size}")
    chosen = _best(options, memory_bytes)
    return Choice(chosen.name, _reason(chosen, options, case, memory_bytes), options)


def serves(name: str, case: Case) -> bool:
    """Whether an exchange can connect these ranks; `hierarchical` needs several full nodes of several ranks."""
    several = case.node_size > 1 and case.ranks > case.node_size
    return name != "hierarchical" or (several and case.ranks % case.node_size == 0)


def _option(name: str, case: Case, machine: Machine) -> Option:
    time = communication.seconds(name, case, machine)
    return Option(name, time, communication.bytes_sent(name, case), communication.memory_bytes(name, case))


def _best(options: Sequence[Option], memory_bytes: float) -> Option:
    fitting = [option for option in options if option.memory_bytes <= memory_bytes]
    if not fitting:
        return min(options, key=lambda option: option.memory_bytes)
    preferred = next((option for name in ("gather", "streamed") for option in fitting if option.name == name), None)
    fastest = min(fitting, key=lambda option: option.seconds)
    if preferred is None:
        return fastest
    faster = preferred.name != "gather" and fastest.seconds < CLEARLY * preferred.seconds
    return fastest if faster else preferred


def _reason(chosen: Option, options: Sequence[Option], case: Case, memory_bytes: float) -> str:
    pairs = f"{case.ranks * case.rows} pairs of width {case.width} on {case.ranks} ranks"
    fits = "of" if chosen.memory_bytes <= memory_bytes else "and nothing fits into"
    sentence = (
        f"{pairs}: {chosen.name} takes {_amount(chosen.memory_bytes)} {fits} {_amount(memory_bytes)}, "
        f"predicted {_time(chosen.seconds)} a step"
    )
    # What a reader will ask about: the fastest other way, and gather where it was passed over.
    rivals = sorted((option for option in options if option is not chosen), key=lambda option: option.seconds)
    told = [_told(option, memory_bytes) for n, option in enumerate(rivals) if n == 0 or option.name == "gather"]
    return f"{sentence} ({'; '.join(told)})" if told else sentence


def _told(option: Option, memory_bytes: float) -> str:
    too_much = f", but takes {_amount(option.memory_bytes)}" if option.memory_bytes > memory_bytes else ""
    return f"{option.name}: predicted {_time(option.seconds)}{too_much}"


def _amount(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
