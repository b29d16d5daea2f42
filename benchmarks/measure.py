"""How everything here is measured: in turns with the peer, by medians, with peak extra memory, and by whom where."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """One number."""

    bench: str
    case: str
    metric: str
    value: float
    unit: str


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():  # compile, allocate, warm the caches
        call()
    for _ in range(rounds):
        for name, call in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def extra_memory_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak memory that a call needs beyond what is in use before it: allocated on a GPU, resident on the CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return_what_is_free()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def return_what_is_free() -> None:
    """Make the C allocator give back what it holds in reserve, and keep no block above 64 KiB from now on (glibc)."""
    libc = ctypes.CDLL(None)
    m_mmap_threshold = -3
    libc.mallopt(m_mmap_threshold, 1 << 16)
    libc.malloc_trim(0)


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def header() -> dict[str, Any]:
    """Machine, versions and commit: without them a figure means nothing."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    cpu = next((line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("torch", "triton", "open_clip_torch", "timm")}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
    }


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(name: str, results: list[Result], folder: Path | None = None) -> Path:
    """Results as JSON under one header; a file a device, so that a GPU's figures never overwrite a CPU's."""
    kind = torch.cuda.get_device_name().replace(" ", "_").lower() if torch.cuda.is_available() else "cpu"
    path = (folder or RESULTS) / f"{name}_{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"header": header(), "results": [asdict(result) for result in results]}, indent=1) + "\n"
    )
    return path


def table(results: list[Result]) -> str:
    """A line a case, a column a metric."""
    metrics = list(dict.fromkeys(f"{result.metric} [{result.unit}]" for result in results))
    rows: dict[str, dict[str, float]] = {}
    for result in results:
        rows.setdefault(result.case, {})[f"{result.metric} [{result.unit}]"] = result.value
    lines = ["| case | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for case, values in rows.items():
        lines.append(f"| {case} | " + " | ".join(f"{values[m]:.4g}" if m in values else "" for m in metrics) + " |")
    return "\n".join(lines)
