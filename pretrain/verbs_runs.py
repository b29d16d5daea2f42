"""`pretrain status` and `pretrain compare`: runs, from their folders alone."""

from __future__ import annotations

import json as text
import sys
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from pretrain import flags
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.history.status import Status

WATCH_S = 10.0
_CLEAR = "\033[H\033[J"
pause = time.sleep


def status(args: list[str]) -> None:
    """`pretrain status RUN... [--json] [--watch [SECONDS]]`."""
    flags.command(_status, _with_seconds(args), "pretrain status")


def compare(args: list[str]) -> None:
    """`pretrain compare RUN RUN... [--json]`."""
    flags.command(_compare, args, "pretrain compare")


def _status(runs: Positional[tuple[Path, ...]], /, *, json: bool = False, watch: float | None = None) -> None:
    """How far a run is, how fast, what it saved, why it was started again, and what went wrong; a line each of several.

    Args:
        runs: Run folders.
        json: Print one JSON object a line and run.
        watch: Print it again each time this many seconds have passed (10 where none are given), until interrupted.
    """
    if watch is not None and not watch > 0:
        raise UserError(f"--watch {watch:g}: the seconds between two looks must be more than 0")
    try:
        while True:
            _show(_read(runs), json, watch is not None and sys.stdout.isatty())
            if watch is None:
                return
            pause(watch)
    except KeyboardInterrupt:
        if watch is None:
            raise


def _compare(runs: Positional[tuple[Path, ...]], /, *, json: bool = False) -> None:
    """What differs between runs: knobs, environment, losses at the same samples, speed, evaluation results.

    Args:
        runs: Run folders, two or more; the others are held against the first.
        json: Print one JSON object instead of tables.
    """
    from pretrain.history import compare, compared, folder

    if len(runs) < 2:
        raise UserError("compare which runs? name two or more run folders: pretrain compare RUN RUN [--json]")
    found = compare.compare([folder.check(run) for run in runs])
    print(text.dumps(found) if json else "\n".join(compared.lines(found)))


def _read(runs: Sequence[Path]) -> list[Status]:
    """The runs among folders; where one alone is named, it must be one."""
    from pretrain.history import folder

    if not runs:
        raise UserError("which run? pretrain status RUN... [--json] [--watch [SECONDS]]")
    meant = [run for run in runs if folder.is_run(run)]
    if not meant or len(runs) == 1:
        folder.check(runs[0])
    if others := [str(run) for run in runs if run not in meant]:
        print(f"pretrain status: no run has begun in {', '.join(others)}", file=sys.stderr)
    return [found for run in meant if (found := _state(run, len(runs) == 1))]


def _state(run: Path, alone: bool) -> Status | None:
    """Of one among several runs that cannot be told, a line; the others are told all the same."""
    from pretrain.history import status

    try:
        return status.read(run)
    except UserError as unreadable:
        if alone:
            raise
        print(f"pretrain status: {unreadable}", file=sys.stderr)
        return None


def _show(found: Sequence[Status], json: bool, clear: bool) -> None:
    from pretrain.history import told

    if not found:
        raise UserError("none of these runs can be told; see above")
    if json:
        lines = [text.dumps(status.facts()) for status in found]
    else:
        lines = told.one(found[0]) if len(found) == 1 else told.several(found)
    print((_CLEAR if clear else "") + "\n".join(lines), flush=True)


def _with_seconds(args: list[str]) -> list[str]:
    """`--watch` may stand alone."""
    out: list[str] = []
    for word, following in zip_longest(args, args[1:], fillvalue=""):
        out.append(word)
        if word == "--watch" and not following.replace(".", "", 1).isdigit():
            out.append(str(WATCH_S))
    return out
