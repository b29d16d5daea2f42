"""`pretrain drill`, and the faults that it puts into `pretrain train`."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pretrain import flags


def faults() -> AbstractContextManager[None]:
    """The faults that PRETRAIN_FAULT asks for; nothing, at no cost, where it is not set."""
    if not os.environ.get("PRETRAIN_FAULT"):
        return nullcontext()
    from pretrain.drill.inject import armed

    return armed(os.environ["PRETRAIN_FAULT"])


def drill(args: list[str]) -> None:
    """`pretrain drill [--only PATTERN] [--ranks 2]`."""
    if not flags.command(_drill, args, "pretrain drill"):
        sys.exit(1)


def _drill(
    *,
    only: str = "*",
    ranks: int = 2,
    engine: str = "auto",
    folder: Path | None = None,
    json: bool = False,
    short: bool = False,
) -> bool:
    """Put a small run through faults, one at a time, and compare its final weights with an undisturbed run's.

    Args:
        only: Faults by name, as a pattern such as 'kill-*'.
        ranks: Processes of the run, at least 2.
        engine: Engine of the run.
        folder: Keep every run and what its ranks said here; default: a temporary folder, removed.
        json: Print a JSON object a fault instead of a table.
        short: Only the faults that stand for their kinds: under a minute.
    """
    from pretrain.drill.run import drill

    return drill(only=only, ranks=ranks, engine=engine, folder=folder, as_json=json, short=short)
