"""Damage to what lies in a run's folder while no rank lives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pretrain.drill.scripts import FAILED, KILLED
from pretrain.drill.trial import Script, Trial

_MIDWAY = "kill@data:step=10"
"""Ends every rank with checkpoints of steps 3 and 6 on disk: that of 9 begins when that of 6 is whole."""
Harm = Callable[[Path], None]
"""Does something to a run folder."""


def damaged(harm: Harm, says: str) -> Script:
    """A run that was ended midway is harmed, and must go on all the same.

    Args:
        says: what rank 0 must say of it; '': it need not say anything.
    """

    def script(trial: Trial) -> None:
        with trial.start(_MIDWAY) as ranks:
            trial.expect(ranks, {"others": (*KILLED, *FAILED)})
        harm(trial.run_folder)
        with trial.start() as ranks:
            trial.expect(ranks)
            trial.must(says in ranks.said(0), f"rank 0 did not say {says!r}")

    return script


def newest(run_folder: Path) -> Path:
    """The folder of the newest checkpoint, good or not."""
    return max((run_folder / "checkpoints").glob("step_*"))


def largest(run_folder: Path) -> Path:
    """The largest file of the newest checkpoint."""
    return max((path for path in newest(run_folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(run_folder: Path) -> None:
    """the newest checkpoint's largest file is cut off"""
    path = largest(run_folder)
    path.write_bytes(path.read_bytes()[:-100])


def flip(run_folder: Path) -> None:
    """one bit of the newest checkpoint has changed"""
    path = largest(run_folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def uncommit(run_folder: Path) -> None:
    """the newest checkpoint has no COMMIT"""
    (newest(run_folder) / "COMMIT").unlink()


def garble_manifest(run_folder: Path) -> None:
    """the newest checkpoint's manifest is not JSON"""
    (newest(run_folder) / "manifest.json").write_text("{")


def tear_metrics(run_folder: Path) -> None:
    """the last line of metrics.jsonl is torn"""
    path = run_folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-40])


def litter(run_folder: Path) -> None:
    """unfinished folders and a lock of processes that are gone"""
    parent = run_folder / "checkpoints"
    for name in (".saving_step_00000009", ".removing_step_00000003", ".saving_00001_step_00000009", "tmp"):
        shutil.copytree(newest(run_folder), parent / name, dirs_exist_ok=True)
    (run_folder / ".lock").write_text("process 1 on a machine that is gone\n")
    (run_folder / ".metrics.jsonl.1").write_text("{")
