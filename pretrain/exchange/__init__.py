"""How features cross ranks for the loss. The file name is the name in the config."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from pretrain import named
from pretrain.errors import UserError
from pretrain.exchange.base import Exchange
from pretrain.exchange.hierarchical import launched
from pretrain.exchange.transport import Alone, Collectives, Group, Transport
from pretrain.exchange.trip import Options
from pretrain.plan.choice import choose_exchange
from pretrain.plan.hardware import CPU, H100

__all__ = ["Exchange", "Load", "Options", "make", "names"]

log = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Load:
    """What an exchange has to carry, for choosing one."""

    rows: int
    """B, of each rank."""
    width: int
    """D"""
    memory_bytes: float
    """What features and gradients of all ranks may take on each rank."""
    on_gpu: bool
    """Whether the cost model's GPU links and speeds apply, or a CPU's."""


def names() -> list[str]:
    """Every built-in exchange."""
    return named.names(sys.modules[__name__])


def make(
    name: str,
    rank: int,
    size: int,
    options: Options | None = None,
    group: Group = None,
    load: Load | None = None,
) -> Exchange:
    """The exchange of a run.

    Args:
        name: of a file; or auto, which says what it chose and why. A dotted name may live outside this package.
        rank: this process.
        size: number of ranks.
        options: default: fp32, everything at its default.
        group: process group of these ranks; default: all processes.
        load: what auto chooses by; default: it takes gather for more than one rank.

    Raises:
        UserError: there is none of this name, or it cannot serve this many ranks.
        ValueError: the group has another size.
    """
    options = options or Options()
    if name == "local" and size > 1:
        raise UserError(f"exchange local keeps each of {size} ranks to its own negatives; set exchange: auto or gather")
    chosen = automatic(size, options, load) if name == "auto" else name
    kind: type[Exchange] = named.find(sys.modules[__name__], chosen, Exchange)
    transport: Transport = Alone() if size == 1 else Collectives(rank, size, group)
    try:
        return kind(transport, options)
    except ValueError as error:
        raise UserError(f"exchange {chosen}: {error}") from None


def automatic(size: int, options: Options, load: Load | None) -> str:
    """The name of the exchange that the cost model predicts to suit, said once with its reason."""
    if size == 1 or load is None:
        return "local" if size == 1 else "gather"
    choice = choose_exchange(
        ranks=size,
        rows=load.rows,
        width=load.width,
        node_size=options.node_size or launched(),
        memory_bytes=load.memory_bytes,
        bytes_each=options.products.itemsize if options.products else 4,
        slices=options.slices,
        machine=H100 if load.on_gpu else CPU,
    )
    log.info("exchange: %s (%s)", choice.name, choice.reason)
    return choice.name
