"""Checks of the folders that a run writes: speed to the disk itself, atomic renames, locks, room."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pretrain import checkpoint
from pretrain.config import Run
from pretrain.data import storage
from pretrain.doctor.base import Finding, Patient, Status
from pretrain.doctor.towers import plain
from pretrain.errors import UserError
from pretrain.plan.memory import MOMENTS

SIZE, SLOW_MB, SLOW = 32 << 20, 20.0, 0.1
"""Bytes written; MB/s that every disk does; share of the ranks' median speed that a disk must reach."""
GIB = 1 << 30


def writing(patient: Patient) -> Iterator[Finding]:
    """The run folder's disk and the shard cache's, of each rank."""
    run = patient.run
    folders = {"run folder": Path(run.folder)}
    if isinstance(home := checkpoint.home(run), Path) and run.checkpoint.to is not None:
        folders["checkpoint.to"] = home
    if run.data.cache_dir is not None:
        folders["data.cache_dir"] = Path(os.path.expanduser(run.data.cache_dir))
    for name, folder in folders.items():
        yield _writes(f"disk of {name}", existing(folder))


def room(patient: Patient) -> Iterator[Finding]:
    """Room for the checkpoints that are kept, and one more that is being written; and for cached shards."""
    run, home = patient.run, checkpoint.home(patient.run)
    if isinstance(home, Path):
        each = checkpoint_bytes(run)
        needed, free = (run.checkpoint.keep_last + 1) * each, shutil.disk_usage(existing(home)).free
        asked = f"{needed / GIB:.2f} GiB for {run.checkpoint.keep_last + 1} checkpoints of {each / GIB:.2f}"
        mend = "free some, lower checkpoint.keep_last, or set checkpoint.to"
        yield Finding("room for checkpoints", f"{free / GIB:.0f} GiB free", _enough(free, needed, each), asked, mend)
    remote = any(not storage.is_local(name) for name in run.data.train)
    if run.data.cache_dir is not None and remote:
        free, limit = shutil.disk_usage(existing(Path(run.data.cache_dir).expanduser())).free, run.data.cache_gb * GIB
        mend = "free some, or lower data.cache_gb"
        status: Status = "ok" if free > limit / 10 else "warn"
        asked = f"up to {run.data.cache_gb:g} GiB, of which a tenth free now"
        yield Finding("room for shards", f"{free / GIB:.0f} GiB free", status, asked, mend)


def checkpoint_bytes(run: Run) -> int:
    """Size of a checkpoint: fp32 weights, their average where there is one, and the optimizer's moments."""
    numbers = sum(param.numel() for param in plain(run).parameters())
    return numbers * (4 + (4 if run.optim.ema_decay is not None else 0) + MOMENTS.get(run.optim.name, 8))


def existing(folder: Path) -> Path:
    """The path, or the nearest above it that is there: where it would be made. Writing finds a file in the way."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _enough(free: int, needed: int, each: int) -> Status:
    return "ok" if free >= needed else "warn" if free >= 2 * each else "fail"


def _writes(name: str, folder: Path) -> Finding:
    mend = f"give this user a folder that can be written, on a disk that works; {folder} is on {_kind(folder)}"
    needed = f"write, fsync, rename and lock; {SLOW_MB:g} MB/s, or {SLOW:.0%} of the ranks' median"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as below:
            speed = _mb_per_s(Path(below) / "written")
            _renames_and_locks(Path(below))
    except OSError as error:
        return Finding(name, f"{folder}: {error.strerror or error}", "fail", needed, mend)
    # Ranks that write at once differ by much; only one that is slow by itself as well is at fault.
    status: Status = "ok" if speed >= SLOW_MB else "warn"
    least = SLOW if status == "warn" else 0.0
    return Finding(name, str(folder), status, needed, mend, amount=speed, unit="MB/s", least=least)


def _mb_per_s(path: Path) -> float:
    """Of a file that is on the disk when the clock is read."""
    content = torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes()  # which no disk packs
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    speed = SIZE / 1e6 / (time.perf_counter() - began)
    if path.read_bytes() != content:
        raise UserError(f"{path.parent.parent}: what is read back is not what was written; leave this disk alone")
    return speed


def _renames_and_locks(folder: Path) -> None:
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    os.replace(new, old)
    if old.read_text() != "new":
        raise OSError(0, "a rename over a file leaves the old one")
    with old.open("r") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _kind(folder: Path) -> str:
    """Type of the file system, as /proc/mounts names it."""
    mounts = Path("/proc/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    above = [(len(line[1]), line[2]) for line in lines if folder.is_relative_to(line[1].replace("\\040", " "))]
    return max(above)[1] if above else "an unknown file system"
