"""RUN/ranks/rank_00000.json: a rank's heartbeat while it runs, and its exit record once it has ended."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER, BEFORE, TRACES = "ranks", "ranks_before", "collectives"
SILENT_S = 10.0
"""A rank whose file is this much older than the newest one gives no sign; they are written every two seconds."""


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    rank: int
    host: str
    pid: int
    attempt: int
    """How often a scheduler or launcher has started the job before."""
    step: int
    """Optimizer steps done."""
    phase: str
    detail: str
    since: str
    """When it last entered or left a phase; UTC, ISO 8601, as `time`."""
    time: str
    calls: int
    """Collectives entered."""
    call: str
    """The last of them."""
    entered: int
    """Phases entered since the last collective."""
    background: str | None = None
    """What a thread beside the main one does."""
    code: int | None = None
    """Exit code, once it has ended."""
    reason: str | None = None
    age_s: float = 0.0
    """Seconds that its file is older than the newest rank's; not in the file."""

    @property
    def where(self) -> tuple[int, int, int]:
        """How far it is: grows along a run, and is equal where ranks are at the same point."""
        return self.step, self.calls, self.entered

    @property
    def place(self) -> str:
        return f"{self.phase} ({self.detail})" if self.detail else self.phase

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


def open_folder(run_folder: Path) -> Path:
    """An empty folder for this start's heartbeats; those of the start before are kept beside it, as ranks_before.

    Raises:
        OSError: the disk refuses.
    """
    folder, before = run_folder / FOLDER, run_folder / BEFORE
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    (folder / TRACES).mkdir(parents=True)
    return folder


def write(folder: Path, beat: Beat) -> None:
    """Replace a rank's file in one step; not synced, for it is worth nothing after a crash of the machine.

    Raises:
        OSError: the disk is full or failing.
    """
    facts = dataclasses.asdict(beat)
    facts.pop("age_s")
    path = _path(folder, beat.rank)
    temp = path.with_name(f".{path.name}")
    temp.write_text(json.dumps(facts) + "\n")
    os.replace(temp, path)


def read(folder: Path) -> list[Beat]:
    """Every rank's last sign, in rank order; ranks that never wrote are missing.

    Files are compared by the time that their file system gave them, not by clocks of different machines.
    """
    found: list[tuple[float, dict[str, Any]]] = []
    for path in sorted(folder.glob("rank_*.json")):
        found.append((path.stat().st_mtime, json.loads(path.read_text())))
    newest = max((when for when, _ in found), default=0.0)
    return [Beat(**facts, age_s=newest - when) for when, facts in found]


def stack_path(folder: Path, rank: int) -> Path:
    """Where a rank that stands still writes what its threads are at."""
    return _path(folder, rank).with_suffix(".stack")


def condition(beat: Beat) -> str | None:
    """Why a rank will not go on, as far as its file and this machine tell; None: it gives signs of life."""
    if beat.code is not None:
        return f"has ended with exit code {beat.code}" + (f": {beat.reason}" if beat.reason else "")
    state = _state(beat.pid) if beat.host == socket.gethostname() else "unknown"
    if state is None:
        return "is gone: no process has its number, and it left no exit code"
    if state == "T":
        return "is stopped by a signal (SIGSTOP)"
    return f"gives no sign since {beat.time}" if beat.age_s > SILENT_S else None


def running(host: str, pid: int) -> bool | None:
    """Whether a process is there; None: that of another machine, and nobody here knows."""
    state = _state(pid) if host == socket.gethostname() else "unknown"
    return None if state == "unknown" else state is not None


def attempt() -> int:
    """How often SLURM or torchrun say that they started this job before."""
    names = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return sum(int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit())


def stamp(seconds_ago: float = 0.0) -> str:
    """A moment as UTC in ISO 8601, to the millisecond."""
    then = datetime.now(UTC).timestamp() - seconds_ago
    return datetime.fromtimestamp(then, UTC).isoformat(timespec="milliseconds")


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def _state(pid: int) -> str | None:
    """The state letter of a process of this machine; None: there is none, or it has ended and nobody has asked how."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None if Path("/proc/self").exists() else "unknown"
    return None if state in "ZX" else state
