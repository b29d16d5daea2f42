"""`pretrain ranks`: what every rank of a run last said of itself, from its files alone."""

from __future__ import annotations

import dataclasses
import json as text
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from pretrain import flags
from pretrain.errors import UserError


def ranks(args: list[str]) -> None:
    """`pretrain ranks RUN [--json] [--trace]`."""
    flags.command(_ranks, args, "pretrain ranks")


def _ranks(run: Positional[Path], /, *, json: bool = False, trace: bool = False) -> None:
    """Where every rank of a run is or how it ended, and what the last report of a standstill says.

    Args:
        run: Run folder.
        json: Print one JSON object instead of a table.
        trace: Let torch analyse the flight recorder's dumps; it unpickles them, so the run must be one that you trust.
    """
    from pretrain.watch import traces
    from pretrain.watch.beats import FOLDER, TRACES, condition, read

    if not (run / FOLDER).is_dir():
        raise UserError(f"{run}: there is no folder {FOLDER} in it: name the folder of a run that has started")
    beats, stall = read(run / FOLDER), _last_stall(run)
    found = traces.analyse(run / FOLDER / TRACES) if trace else None
    if json:
        listed = [dataclasses.asdict(beat) | {"condition": condition(beat)} for beat in beats]
        print(text.dumps({"ranks": listed, "stall": stall, "trace": found}))
        return
    print(f"{'rank':>5} {'host':16} {'pid':>8} {'step':>9}  {'last sign':24}  phase, or how it ended")
    for beat in beats:
        now = condition(beat) or f"{beat.place} since {beat.since[11:19]}"
        now += f", and {beat.background} in the background" if beat.background else ""
        print(f"{beat.rank:>5} {beat.host:16.16} {beat.pid:>8} {beat.step:>9}  {beat.time[:23]:24}  {now}")
    if stall is not None:
        print(f"\nlast standstill, at {stall['time'][:19]}, told by rank {stall['told_by']}:")
        print("\n".join(f"  {line}" for line in stall["lines"]))
    if trace:
        print(found or "\nno dumps of the flight recorder lie there")


def _last_stall(run: Path) -> dict[str, Any] | None:
    path = run / "stalls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return text.loads(lines[-1]) if lines else None
