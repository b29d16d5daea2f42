"""`pretrain report`: what it takes from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from pretrain import flags
from pretrain.errors import UserError
from pretrain.show import show

Average = Literal["auto", "yes", "no"]
_AVERAGE: dict[Average, bool | None] = {"auto": None, "yes": True, "no": False}


def report(args: list[str]) -> None:
    """`pretrain report RUN [RUN...] [--out FILE]`."""
    flags.command(_report, args, "pretrain report")


def _report(
    runs: Positional[tuple[Path, ...]],
    /,
    *,
    out: Path | None = None,
    pairs: int = 128,
    data: tuple[str, ...] = (),
    average: Average = "auto",
    json: bool = False,
) -> None:
    """Write one HTML file about a run, or about several beside each other: curves, events, evaluation, held-out pairs.

    Args:
        runs: Run folders; they may be running.
        out: The file to write; default: report.html in the first run's folder.
        pairs: Held-out pairs to encode and look at, of each run; 0: none.
        data: Held-out shards; default: each run's data.eval.
        average: Use the averaged (EMA) weights; auto: where there are any.
        json: Print one JSON object instead of a table.
    """
    if not runs:
        raise UserError("which run? pretrain report RUN [RUN...] [--out FILE]")
    if not 0 <= pairs <= 1024:
        raise UserError(f"--pairs {pairs}: a page holds 0 to 1024 pairs, 128 for instance")
    from pretrain.report import write

    show(write(runs, out, pairs, _AVERAGE[average], data), json)
