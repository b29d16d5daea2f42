"""Disks that are really full or read-only: small file systems in memory, where this process may mount them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pretrain.drill.scripts import FAILED, KILLED, REFUSED
from pretrain.drill.trial import Script, Trial

ROOM, PLENTY = "size=40m", "size=400m"
"""For one checkpoint of the drilled run, not for two; for all."""


def full(trial: Trial) -> None:
    """The second checkpoint does not fit; then the disk grows."""
    with _mounted(trial.folder, ROOM):
        with trial.start() as ranks:
            trial.expect(ranks, {"others": REFUSED})
            trial.must("No space left on device" in ranks.said(0), "rank 0 did not say that the disk is full")
        _mount(trial.folder, f"remount,{PLENTY}")
        trial.finish()


def read_only(trial: Trial) -> None:
    """A start finds the run's folder read-only, for root too; the next one does not."""
    with _mounted(trial.folder, PLENTY):
        with trial.start("kill@data:step=5") as ranks:
            trial.expect(ranks, {"others": (*KILLED, *FAILED)})
        _mount(trial.folder, "remount,ro")
        with trial.start() as ranks:
            trial.expect(ranks, {"others": REFUSED})
            trial.must("Read-only file system" in ranks.said(0), "rank 0 did not say that it may not write")
        _mount(trial.folder, "remount,rw")
        trial.finish()


def without(pattern: str) -> Script:
    """Files of the data are away when the run begins, and back for the next start."""

    def script(trial: Trial) -> None:
        away = {path: path.with_name(f"{path.name}.away") for path in trial.setting.folder.glob(pattern)}
        trial.must(bool(away), f"there is no {pattern}")
        for path, other in away.items():
            path.rename(other)
        try:
            with trial.start() as ranks:
                trial.expect(ranks, {"others": REFUSED})
        finally:
            for path, other in away.items():
                other.rename(path)
        trial.finish()

    return script


@cache
def may_mount() -> bool:
    """Whether this process may mount a file system."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory at `folder`; what it holds at the end stays there."""
    folder.mkdir()
    _mount(folder, options, "-t", "tmpfs", "tmpfs")
    kept = folder.with_name(f"{folder.name}.kept")
    try:
        yield
        shutil.copytree(folder, kept)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    kept.rename(folder)


def _mount(folder: Path, options: str, *what: str) -> None:
    subprocess.run(["mount", "-o", options, *what, str(folder)], check=True)
