"""The drill: every fault on a run of its own, and a row of the table for each."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

from pretrain.drill import sources, table
from pretrain.drill.faults import Fault, catalogue
from pretrain.drill.spec import VARIABLE
from pretrain.drill.table import Row
from pretrain.drill.trial import Setting, Trial
from pretrain.errors import UserError


def drill(only: str, ranks: int, engine: str, folder: Path | None, as_json: bool, short: bool) -> bool:
    """Whether every fault chosen came about, ended as it should, and changed nothing.

    Raises:
        UserError: no fault has such a name, or the run cannot be.
    """
    chosen = [fault for fault in catalogue(ranks) if fnmatchcase(fault.name, only) and (fault.short or not short)]
    if not chosen:
        raise UserError(f"--only {only}: no fault has such a name; see docs/reliability.md, or give a pattern")
    if ranks < 2:
        raise UserError(f"--ranks {ranks}: faults of one rank among others need at least 2")
    if VARIABLE in os.environ:
        raise UserError(f"{VARIABLE} is set, and the drill sets it itself: unset it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # no rank and no mount is left behind
    began = time.monotonic()
    rows: list[Row] = []
    with _somewhere(folder) as place:
        for row in tried(chosen, Setting(ranks, engine, place)):
            table.tell(row, as_json, first=not rows)
            rows.append(row)
            if folder is None:
                shutil.rmtree(place / row.name)
    table.tell_end(rows, time.monotonic() - began, as_json)
    return all(row.good for row in rows)


def tried(faults: Sequence[Fault], setting: Setting) -> Iterator[Row]:
    """A row for each fault, as soon as it is known.

    Raises:
        UserError: the undisturbed run itself fails.
    """
    import_module("pretrain.train")  # once, for all the ranks that are forked from here
    calm: dict[str, Trial] = {}
    for fault in faults:
        if fault.source not in calm:
            calm[fault.source] = _undisturbed(setting, fault)
        yield _row(fault, setting, calm[fault.source])


def _undisturbed(setting: Setting, fault: Fault) -> Trial:
    trial = Trial(setting, f"undisturbed-{fault.source}", sources.SOURCES[fault.source](setting.folder))
    trial.finish()
    if trial.problems:
        raise UserError(f"the undisturbed run failed: {trial.problems[0]}; nothing can be compared with it")
    return trial


def _row(fault: Fault, setting: Setting, calm: Trial) -> Row:
    trial = Trial(setting, fault.name, (*calm.flags, *fault.flags))
    fault.script(trial)
    weights = trial.compare(calm)
    return Row(fault.name, fault.what, tuple(trial.ends), weights, trial.took_s, tuple(trial.problems))


@contextmanager
def _somewhere(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="drill-") as made:
        yield Path(made)
