"""How features cross ranks for the loss. The file name is the name in the config."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from pretrain import named
from pretrain.errors import UserError
from pretrain.exchange.base import Exchange
from pretrain.exchange.transport import Alone, Collectives, Group, Transport
from pretrain.exchange.trip import Options

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
    return kind(transport, options)


def automatic(size: int, options: Options, load: Load | None) -> str:
    """The name of the exchange for this many ranks."""
    if size == 1 or load is None:
        return "local" if size == 1 else "gather"
    return "gather"
