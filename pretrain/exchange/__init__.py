"""How features cross ranks for the loss. The file name is the name in the config."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pretrain import named
from pretrain.errors import UserError
from pretrain.exchange.base import Exchange


def names() -> list[str]:
    """Every built-in exchange."""
    return named.names(sys.modules[__name__])


def find(name: str, size: int) -> Callable[[int, int], Exchange]:
    """The exchange of a run; it is made as `find(name, size)(rank, size)`.

    Args:
        name: of a file, or auto: local for one rank, gather for more. A dotted name may live outside this package.
        size: number of ranks.

    Raises:
        UserError: there is none of this name, or it cannot serve this many ranks.
    """
    if name == "local" and size > 1:
        raise UserError(f"exchange local keeps each of {size} ranks to its own negatives; set exchange: auto or gather")
    chosen = ("local" if size == 1 else "gather") if name == "auto" else name
    return named.find(sys.modules[__name__], chosen, Exchange)
