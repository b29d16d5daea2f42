"""What torch's flight recorder has seen of a rank's collectives, as files that its own analysis reads."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

PREFIX = "rank_"
_ANALYSIS_S = 120


def write(folder: Path, rank: int, size: int) -> None:
    """The collectives that this process has entered, the last 2,000 at most, as folder/rank_N.

    Args:
        folder: made where it is not there.

    Raises:
        OSError: the disk is full or failing.
    """
    if size == 1 or not dist.is_available() or not dist.is_initialized():
        return
    found = torch_c10d()
    if found is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{PREFIX}{rank}").write_bytes(found)


def torch_c10d() -> bytes | None:
    """The recorder's content without stacks, whose making may wait for a lock; None: this torch has no recorder."""
    from torch._C import _distributed_c10d as c10d

    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        if dump := getattr(c10d, name, None):
            with contextlib.suppress(RuntimeError):  # of a backend that has not begun
                content: bytes = dump(includeStackTraces=False)
                return content
    return None


def analyse(folder: Path) -> str | None:
    """torch's account of which collectives do not match, or lack a rank; None: there is nothing to read.

    It unpickles what it reads: the folder must be one that you trust. It runs in a process of its own.
    """
    if not any(folder.glob(f"{PREFIX}*")):
        return None
    words = ("-m", "torch.distributed.flight_recorder.fr_trace", str(folder), "--prefix", PREFIX)
    command = [sys.executable, *words, "--allow-incomplete-ranks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_ANALYSIS_S)
    return (done.stdout + done.stderr).strip()
