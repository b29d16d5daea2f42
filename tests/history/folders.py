"""Run folders written by hand, as a run leaves them at some moment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pretrain.metrics import KEYS

BATCH = 32
BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(seconds: float) -> str:
    """A moment of the run's first day."""
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def record(step: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"step": step, "epoch": 0.1, "samples": step * BATCH, "loss": 3.0, "terms": {"clip": 3.0}}
    values |= {"lr": 1e-3, "logit_scale": 14.3, "logit_bias": None}
    values |= {"grad_norm": {"total": 1.0, "image": 0.6, "text": 0.8}, "samples_per_s": 64.0, "step_s": 0.5}
    values |= {"data_wait_s": 0.1, "phases_s": {"data": 0.1, "other": 0.4}, "exchange_bytes": 0}
    values |= {"peak_memory_bytes": 2**30, "skipped": 0, "truncated": 0, "batch_digest": None, "steps_skipped": 0}
    values |= {"rewinds": 0, "geometry": {"image_rank": 3.0}, "weights_hash": None} | changes
    assert tuple(values) == KEYS
    return values


def event(kind: str, seconds: float, step: int, **facts: Any) -> dict[str, Any]:
    return {"time": at(seconds), "event": kind, "step": step, **facts}


def beat(rank: int = 0, **changes: Any) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    values: dict[str, Any] = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "attempt": 0, "step": 7}
    values |= {"phase": "data", "detail": "", "since": now, "time": now, "calls": 3, "call": "all_reduce", "entered": 1}
    return values | {"background": None, "code": None, "reason": None} | changes


def dead_pid() -> int:
    """Of a process that was, and has been asked how it ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def write(run: Path, **files: list[dict[str, Any]]) -> Path:
    """A run folder: `beats` go to ranks/, everything else to NAME.jsonl; config.yaml asks for 40 steps of BATCH."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(f"name: {run.name}\ntrain: {{samples: {40 * BATCH}, global_batch: {BATCH}}}\n")
    for item in files.pop("beats", []):
        (run / "ranks").mkdir(exist_ok=True)
        (run / "ranks" / f"rank_{item['rank']:05d}.json").write_text(json.dumps(item))
    for name, items in files.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return run


def checkpoint(parent: Path, step: int, commit: bool = True, size: int = 5) -> Path:
    """A folder that looks like a checkpoint of one file."""
    folder = parent / "checkpoints" / f"step_{step:08d}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "model.safetensors").write_bytes(b"x" * size)
    (folder / "manifest.json").write_text(json.dumps({"weights/model.safetensors": {"size": 5, "xxh3_64": "0"}}))
    if commit:
        (folder / "COMMIT").write_text("{}")
    return folder
