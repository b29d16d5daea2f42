"""How everything here is measured: in turns with its peers, by quantiles, beside what the machine can do just then."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WARM_UP_S = 0.3
"""On a GPU, whose clocks rise only under load."""
ENOUGH_S = 4.0
EVICTED_BYTES = 1 << 30
"""Written before each timed call on a GPU: empties its caches, and lets the host run ahead, so that the queue is full
when the call begins."""
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls."""

    median: float
    p10: float
    p90: float
    count: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        if len(seconds) < 2:
            return Timing(seconds[0], seconds[0], seconds[0], 1)
        tenths = quantiles(seconds, n=10, method="inclusive")
        return Timing(median(seconds), tenths[0], tenths[-1], len(seconds))


def interleaved(candidates: dict[str, Call], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Timing of each candidate; they take turns, so that a busy machine slows all of them alike.

    On a GPU there are fewer rounds where so many would take longer than ENOUGH_S, but never fewer than three.
    """
    turn = warm_up(list(candidates.values()), device)
    if device.type == "cuda":
        rounds = min(rounds, max(3, int(ENOUGH_S / turn)))
    times: dict[str, list[Call]] = {name: [] for name in candidates}
    clock = _device_clock(device) if device.type == "cuda" else _host_clock
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(clock(call))
    synchronize(device)
    return {name: Timing.of([read() for read in readings]) for name, readings in times.items()}


def warm_up(calls: Sequence[Call], device: torch.device) -> float:
    """Compile, allocate, fill the caches, raise the clocks: every call once, on a GPU as often as the time takes.

    Returns:
        Seconds of the last turn.
    """
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        for call in calls:
            call()
        synchronize(device)
        if device.type != "cuda" or time.perf_counter() - start > WARM_UP_S:
            return time.perf_counter() - before


def _host_clock(call: Call) -> Call:
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return lambda: seconds


def _device_clock(device: torch.device) -> Callable[[Call], Call]:
    evicted = torch.empty(EVICTED_BYTES // 4, dtype=torch.int32, device=device)

    def clock(call: Call) -> Call:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        evicted.zero_()
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    return clock


def peak(device: torch.device, dtype: torch.dtype, width: int, rounds: int = 5) -> float:
    """FLOP/s of the fastest of a few library matrix products just now, on rows like features: Gaussian, of unit norm.

    Zeros or small integers would run up to 15 % faster on a GPU, by taking less power.
    """
    long, square = (16384, 8192) if device.type == "cuda" else (4096, 2048)
    shapes = [(long, long, width), (square, square, square)]
    calls: dict[str, Call] = {}
    for m, n, k in shapes:
        left, right = (unit_rows(count, k, device, dtype, seed=count) for count in (m, n))
        calls[f"{m},{n},{k}"] = partial(torch.mm, left, right.t(), out=left.new_empty(m, n))
    found = interleaved(calls, rounds, device)
    return max(2.0 * m * n * k / found[f"{m},{n},{k}"].median for m, n, k in shapes)


def unit_rows(count: int, width: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """[count, width] Gaussian directions, made where they are used: a million rows take a CPU seconds."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty(count, width, dtype=dtype, device=device)
    for part in rows.split(65536):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator, device=device), dim=1))
    return rows


def extra_memory_bytes(call: Call, device: torch.device) -> int:
    """Peak memory that a call needs beyond what is in use before it: allocated on a GPU, resident on the CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def keep_nothing_freed() -> None:
    """Make the C allocator (glibc) give every freed block above 1 MiB back at once, for the rest of this process.

    Blocks that it kept would count as in use. To be called before the first large block, since those that are kept
    already stay; large logits, above 32 MiB, are treated so in any process.
    """
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def free_bytes(device: torch.device) -> int:
    """What is left for new tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def loaded_clocks(device: torch.device) -> dict[str, float]:
    """`clocks` of a GPU at work: asked for while a fraction of a second of matrix products is queued."""
    if device.type != "cuda":
        return {}
    square = unit_rows(8192, 8192, device, torch.bfloat16, seed=0)
    for _ in range(300):
        torch.mm(square, square)
    found = clocks()
    synchronize(device)
    return found


def clocks() -> dict[str, float]:
    """Clocks, power and temperature of the GPU at this moment, as its driver tells them; empty where there is none."""
    fields = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.splitlines()[0].split(",") if done.stdout else []
    pairs = zip(fields.values(), values, strict=False)
    return {name: float(value) for name, value in pairs if value.strip().replace(".", "", 1).isdigit()}
