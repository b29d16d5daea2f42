"""How far a long command is, on standard error: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_EVERY_S = 10.0


class Meter:
    """Counts samples and bytes.

    Args:
        what: word in front of the line.
        total: samples to come; None: nobody knows yet.
        stream: default: standard error.
    """

    def __init__(self, what: str, total: int | None, stream: TextIO | None = None) -> None:
        self._what, self._total, self._stream = what, total, stream or sys.stderr
        self._start = self._said = time.monotonic()
        self.samples, self.bytes, self._kept = 0, 0, 0
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (TextColumn(what), BarColumn(bar_width=None), TextColumn("{task.fields[said]}"))
            self._bar = Progress(*columns, console=Console(file=self._stream), expand=True, transient=True)
            self._task = self._bar.add_task(what, total=total, said="")
            self._bar.start()

    def keep(self, samples: int) -> None:
        """Samples that were done before this start: they count, but not towards the speed."""
        self._kept += samples
        self.add(samples, 0)

    def add(self, samples: int, size: int) -> None:
        """More samples, of so many bytes."""
        self.samples, self.bytes = self.samples + samples, self.bytes + size
        if self._bar is not None:
            self._bar.update(self._task, completed=self.samples, said=self._line())
        elif time.monotonic() - self._said >= _EVERY_S:
            self._print()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._print()

    def _print(self) -> None:
        self._said = time.monotonic()
        print(f"{self._what}: {self._line()}", file=self._stream, flush=True)

    def _line(self) -> str:
        spent = max(time.monotonic() - self._start, 1e-9)
        speed = (self.samples - self._kept) / spent
        total = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self.samples:,}{total} samples", f"{speed:,.0f}/s", f"{self.bytes / spent / 1e6:,.1f} MB/s"]
        if self._total is not None and speed and self.samples < self._total:
            parts.append(f"{(self._total - self.samples) / speed:,.0f} s left")
        return ", ".join(parts)
