"""How features cross ranks for the loss. The file name is the name in the config."""

from __future__ import annotations

import sys

from pretrain import named
from pretrain.errors import UserError
from pretrain.exchange.base import Exchange
from pretrain.exchange.transport import Alone, Collectives, Group, Transport
from pretrain.exchange.trip import Options

__all__ = ["Exchange", "Options", "make", "names"]


def names() -> list[str]:
    """Every built-in exchange."""
    return named.names(sys.modules[__name__])


def make(name: str, rank: int, size: int, options: Options | None = None, group: Group = None) -> Exchange:
    """The exchange of a run.

    Args:
        name: of a file, or auto: local for one rank, gather for more. A dotted name may live outside this package.
        rank: this process.
        size: number of ranks.
        options: default: fp32, everything at its default.
        group: process group of these ranks; default: all processes.

    Raises:
        UserError: there is none of this name, or it cannot serve this many ranks.
        ValueError: the group has another size.
    """
    if name == "local" and size > 1:
        raise UserError(f"exchange local keeps each of {size} ranks to its own negatives; set exchange: auto or gather")
    chosen = ("local" if size == 1 else "gather") if name == "auto" else name
    kind: type[Exchange] = named.find(sys.modules[__name__], chosen, Exchange)
    transport: Transport = Alone() if size == 1 else Collectives(rank, size, group)
    return kind(transport, options)
