"""What nvidia-smi tells of the GPUs: asked for as CSV, one GPU a line, in the order of FIELDS.

It is the driver's own tool, there wherever a GPU is; its field names are listed by `nvidia-smi --help-query-gpu`.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

FIELDS = (
    *("uuid", "driver_version", "temperature.gpu", "clocks.sm", "clocks.max.sm", "memory.used", "memory.total"),
    *("ecc.errors.uncorrected.volatile.total", "retired_pages.pending"),
)
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Today's name of the last field, and that of drivers before 535."""
ANSWER_S = 30

SLOWED = {0x08: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
"""Bits of the last field that speak of trouble; idle (1), chosen clocks (2) and the power cap (4) do not.
Source: nvml.h, nvmlClocksEventReasons."""


@dataclass(frozen=True)
class Gpu:
    """A line; None: the GPU does not tell."""

    uuid: str
    driver: str
    temperature: float | None
    """Degrees Celsius."""
    clock: float | None
    """MHz now, of the multiprocessors."""
    top_clock: float | None
    used: float | None
    """MiB."""
    total: float | None
    """MiB."""
    uncorrected: float | None
    """Memory errors since the driver was loaded that ECC could not mend."""
    pending: bool
    """A memory page waits for a reset to be taken out of use."""
    slowed: tuple[str, ...]
    """Why the clocks are held down."""


def gpus() -> list[Gpu]:
    """Every GPU that the driver shows; empty where nvidia-smi is not there, fails or hangs."""
    for reasons in REASONS:
        if said := _ask(",".join((*FIELDS, reasons))):
            return parse(said)
    return []


def driver() -> str | None:
    """The driver's version; None: it is not told."""
    lines = (_ask("driver_version") or "").split()
    return lines[0] if lines else None


def parse(text: str) -> list[Gpu]:
    """Back from nvidia-smi's lines; one that has another number of fields is left out."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [_gpu(row) for row in rows if len(row) == len(FIELDS) + 1]


def _gpu(row: list[str]) -> Gpu:
    uuid, version, *numbers, pending, reasons = row
    temperature, clock, top, used, total, uncorrected = map(_number, numbers)
    bits = int(reasons, 16) if reasons.startswith("0x") else 0
    slowed = tuple(why for bit, why in SLOWED.items() if bits & bit)
    return Gpu(uuid, version, temperature, clock, top, used, total, uncorrected, pending == "Yes", slowed)


def _number(cell: str) -> float | None:
    """'[N/A]', '[Not Supported]' and the like are no numbers."""
    try:
        return float(cell)
    except ValueError:
        return None


def _ask(fields: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
