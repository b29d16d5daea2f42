"""Whose run folder it is: one run's, by its config, and one process's at a time, by a lock."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from pretrain import checkpoint_files as files
from pretrain import checks, config
from pretrain.errors import UserError
from pretrain.world import World

_CONFIG, _LOCK = "config.yaml", ".lock"
_HELD: list[TextIO] = []
"""Locks live as long as the process: closing one of these files would release its lock."""


def claim(run_folder: Path, run: config.Run, world: World, text: str) -> None:
    """Take a run folder: the first start writes config.yaml, a later one must ask for the same run. All ranks call it.

    Args:
        text: `run`, resolved, as YAML.

    Raises:
        UserError: on every rank, the folder belongs to another run.
    """
    with world.together(f"opening the run folder {run_folder}"):
        if world.is_main:
            _lock(run_folder)
            _refuse_another(run_folder, run)
            files.write_atomic(run_folder / _CONFIG, text)


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


def _refuse_another(run_folder: Path, run: config.Run) -> None:
    from pretrain import runfile

    path = run_folder / _CONFIG
    if path.exists() and (changed := checks.changes(runfile.load(path, []), run)):
        raise UserError(
            f"name {run.name!r}: {run_folder} belongs to a run with another config ({'; '.join(changed)}); "
            f"use another name, or remove {run_folder}"
        )
