"""Whose run folder it is: one run's, by its config, and one process's at a time, by a lock and by numbered attempts."""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pretrain import checkpoint, checks, config
from pretrain import checkpoint_files as files
from pretrain.checkpoints import attempts, places
from pretrain.checkpoints.attempts import Attempt
from pretrain.checkpoints.url import Folder
from pretrain.errors import UserError
from pretrain.world import World

_CONFIG, _LOCK = "config.yaml", ".lock"
_HELD: list[TextIO] = []
"""Locks live as long as the process: closing one of these files would release its lock."""


@dataclass(frozen=True)
class Claim:
    """A run folder that is this process's."""

    attempt: Attempt
    homes: tuple[Folder, ...]
    """Where checkpoints may lie; new ones go to the first."""


def claim(run_folder: Path, run: config.Run, world: World, text: str) -> Claim:
    """Take a run folder: the first start writes config.yaml, a later one must ask for the same run. All ranks call it.

    Args:
        text: `run`, resolved, as YAML.

    Raises:
        UserError: on every rank, the folder belongs to another run.
    """
    taken: list[Claim] = []
    with world.together(f"opening the run folder {run_folder}"):
        if world.is_main:
            _lock(run_folder)
            before = _refuse_another(run_folder, run)
            homes = [_home(run_folder, item) for item in (run, before) if item] + [run_folder]
            taken.append(_take(list(dict.fromkeys(homes)), run_folder))
            files.write_atomic(run_folder / _CONFIG, text)
    shared: Claim = world.share(taken[0] if taken else None)[0]
    return shared


def _lock(run_folder: Path) -> None:
    """Keep every other process out of the run folder until this one ends, however it ends."""
    run_folder.mkdir(parents=True, exist_ok=True)
    file = (run_folder / _LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: forked workers do not inherit it
    except OSError:
        file.seek(0)
        raise UserError(
            f"{run_folder} is being trained by {file.read().strip()}: stop that, or use another name"
        ) from None
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    _HELD.append(file)


def _take(homes: list[Folder], run_folder: Path) -> Claim:
    """The next attempt; what earlier ones have left unfinished is swept before a checkpoint is looked for."""
    attempt = attempts.take(list(dict.fromkeys([run_folder, *homes])))
    for home in homes:
        places.of(home / "checkpoints", attempt.number).sweep()
    return Claim(attempt, tuple(homes))


def _home(run_folder: Path, run: config.Run) -> Folder:
    return run_folder if run.checkpoint.to is None else checkpoint.home(run)


def _refuse_another(run_folder: Path, run: config.Run) -> config.Run | None:
    """The run as it was at the start before this one; None: this is the first."""
    from pretrain import runfile

    path = run_folder / _CONFIG
    before = runfile.load(path, []) if path.exists() else None
    if before is not None and (changed := checks.changes(before, run)):
        raise UserError(
            f"name {run.name!r}: {run_folder} belongs to a run with another config ({'; '.join(changed)}); "
            f"use another name, or remove {run_folder}"
        )
    return before
