"""How far a run is and how fast, from metrics.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.history import folder, lines
from pretrain.history.lines import Record

RECENT = 10
"""Records that 'now' means."""


@dataclass(frozen=True)
class Progress:
    """What the records of a run say; None: they do not say it, or there are none."""

    step: int
    samples: int
    epoch: float | None
    total_samples: int | None
    loss: float | None
    samples_per_s: float | None
    """Of the last records."""
    step_s: float | None
    data_wait: float | None
    """Share of a step's time in the last records, of ranks on average."""
    training_s: float
    """Seconds in steps that count: without those done again, saving, evaluating and starting. Above `lines.SMALL` bytes
    of records it is estimated from some of them."""
    peak_memory_bytes: int | None
    skipped: int
    """Samples that were replaced because they could not be read."""

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at the present speed."""
        if self.total_samples is None or not self.samples_per_s:
            return None
        return max(0, self.total_samples - self.samples) / self.samples_per_s


def read(run: Path, config: Mapping[str, Any], total_samples: int | None, step: int | None) -> Progress:
    """How far the run in a folder is.

    Args:
        config: its knobs.
        total_samples: its length, where a start has told it.
        step: what a rank that is alive says; the records may be behind it.
    """
    records = lines.tail(run / "metrics.jsonl")
    last: Record = records[-1] if records else {}
    batch = folder.knob(config, "train", "global_batch")
    reached = max(_count(last, "step"), step or 0)
    recent = records[-RECENT:]
    waits = [
        r["data_wait_s"] / r["step_s"] for r in recent if _number(r, "data_wait_s") is not None and _number(r, "step_s")
    ]
    return Progress(
        step=reached,
        samples=reached * batch if isinstance(batch, int) else _count(last, "samples"),
        epoch=_number(last, "epoch"),
        total_samples=total_samples or _length(config, last),
        loss=_number(last, "loss"),
        samples_per_s=_harmonic([r["samples_per_s"] for r in recent if _number(r, "samples_per_s")]),
        step_s=statistics.fmean(steps_s) if (steps_s := _column(recent, "step_s")) else None,
        data_wait=statistics.fmean(waits) if waits else None,
        training_s=_training_s(run / "metrics.jsonl", _count(last, "step")),
        peak_memory_bytes=last.get("peak_memory_bytes"),
        skipped=_count(last, "skipped"),
    )


def _training_s(path: Path, steps: int) -> float:
    """Each record speaks for the steps since the one before."""
    total, before, covered = 0.0, 0, 0
    for record in lines.thinned(path):
        step, seconds = record.get("step"), _number(record, "step_s")
        if isinstance(step, int) and seconds is not None and step > before:
            total, covered, before = total + seconds * (step - before), covered + step - before, step
    return total * steps / covered if covered else 0.0


def _length(config: Mapping[str, Any], last: Record) -> int | None:
    """Samples of the whole run, in whole steps."""
    batch, samples = (folder.knob(config, "train", name) for name in ("global_batch", "samples"))
    epochs, epoch = folder.knob(config, "train", "epochs"), _number(last, "epoch")
    if samples is None and epochs is not None and epoch:
        samples = math.ceil(epochs * round(last["samples"] / epoch))
    return math.ceil(samples / batch) * batch if samples and batch else None


def _number(record: Record, name: str) -> float | None:
    value = record.get(name)
    return value if isinstance(value, int | float) else None


def _count(record: Record, name: str) -> int:
    """0 where it is not told, or is no number: somebody may have written into the file by hand."""
    value = _number(record, name)
    return int(value) if value is not None and math.isfinite(value) else 0


def _column(records: Sequence[Record], name: str) -> list[float]:
    return [value for record in records if (value := _number(record, name)) is not None]


def _harmonic(values: Sequence[float]) -> float | None:
    return statistics.harmonic_mean(values) if values else None
