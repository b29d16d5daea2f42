"""The run on a terminal: a live bar, or plain lines where nobody watches."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn

from pretrain.metrics import time_left_s
from pretrain.show import duration

__all__ = ["Console", "duration"]


class Console:
    """Shows step, loss, learning rate, scale, throughput, data wait and time left."""

    def __init__(
        self,
        total_samples: int,
        global_batch: int,
        samples: int = 0,
        progress: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """
        Args:
            samples: pairs seen when this attempt starts.
            progress: a live bar where the stream is a terminal; otherwise a line per record.
            stream: default: standard output.
        """
        self._total, self._batch = total_samples, global_batch
        self._stream = stream or sys.stdout
        self._bar: Progress | None = None
        if progress and self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.fields[count]}"),
                BarColumn(bar_width=None, complete_style="cyan"),
                TextColumn("{task.fields[numbers]}"),
                console=Terminal(file=self._stream),
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_samples, completed=samples, count="starting", numbers="")
            self._bar.start()

    def write(self, record: Mapping[str, Any]) -> None:
        count = f"step {record['step']}/{math.ceil(self._total / self._batch)}"
        numbers = self._numbers(record)
        if self._bar is None:
            print(f"{count}  {numbers}", file=self._stream, flush=True)
        else:
            self._bar.update(self._task, completed=record["samples"], count=count, numbers=numbers)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _numbers(self, record: Mapping[str, Any]) -> str:
        wait = record["data_wait_s"] / record["step_s"] if record["step_s"] else 0.0
        left = time_left_s(self._total, record["samples"], record["samples_per_s"])
        parts = [
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"scale {record['logit_scale']:.2f}",
            f"{record['samples_per_s']:,.0f} samples/s",
            f"data wait {wait:.0%}",
            *_longest(record["phases_s"]),
            f"left {duration(left)}",
        ]
        parts += [f"skipped {record['skipped']}"] if record["skipped"] else []
        return "  ".join(parts)


def _longest(phases_s: Mapping[str, float], count: int = 2) -> list[str]:
    """The phases that take most of a step, with their shares; nothing where none was timed."""
    total = sum(phases_s.values())
    first = sorted(phases_s.items(), key=lambda item: -item[1])[: count if total else 0]
    return [f"{name} {seconds / total:.0%}" for name, seconds in first]
