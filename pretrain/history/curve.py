"""Every record of a run as a few columns of numbers: a million lines take seconds and a tenth of a gigabyte."""

from __future__ import annotations

import json
import math
import re
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.history import lines

Numbers = NDArray[np.float64]
_PLAIN = re.compile(
    rb'\{"step": \d+, "epoch": [^,]+, "samples": (\d+), "loss": (?:null|([^,]+)), "terms": \{[^}]*\}, "lr": [^,]+, '
    rb'"logit_scale": [^,]+, "logit_bias": [^,]+, "grad_norm": \{[^}]*\}, "samples_per_s": [^,]+, "step_s": [^,]+, '
    rb'"data_wait_s": [^,]+, "phases_s": \{[^}]*\}, "exchange_bytes": [^,]+, "peak_memory_bytes": [^,]+, '
    rb'"skipped": [^,]+, "truncated": [^,]+, "batch_digest": (?:null|"([^"]*)")'
)
"""A record as `metrics.Meter` writes it; others are parsed as JSON, which takes several times as long."""


@dataclass(frozen=True)
class Curve:
    """Columns of equal length, samples ascending."""

    samples: Numbers
    """[records] fp64: pairs seen."""
    loss: Numbers
    """[records] fp64; NaN where it was not finite."""
    digests: NDArray[np.int64]
    """[records] hashes of the batches' digests, comparable within this process; 0: none was logged."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def final(self) -> float | None:
        """The last loss; None: there is none, or it was not finite."""
        return finite(float(self.loss[-1])) if len(self) else None


def read(path: Path) -> Curve:
    """metrics.jsonl as columns. A record takes the place of earlier ones of its step and later steps: what a run wrote
    before it was killed, or went back, is not its history.

    Args:
        path: need not be there.
    """
    samples, losses, digests = array("d"), array("d"), array("q")
    for line in lines.whole(path):
        values = _values(line)
        if values is None:
            continue
        while samples and samples[-1] >= values[0]:
            for column in (samples, losses, digests):
                column.pop()
        samples.append(values[0])
        losses.append(values[1])
        digests.append(values[2])
    return Curve(np.array(samples), np.array(losses), np.array(digests, dtype=np.int64))


def finite(value: Any) -> float | None:
    """A number for JSON; None where it is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _values(line: bytes) -> tuple[float, float, int] | None:
    """Samples, loss and the digest's hash; None: no record."""
    with suppress(ValueError, TypeError, KeyError):
        if found := _PLAIN.match(line):
            samples, loss, digest = found.groups()
            return float(samples), math.nan if loss is None else float(loss), 0 if digest is None else hash(digest)
        record = json.loads(line)  # of another version, or torn
        loss, digest = record["loss"], record.get("batch_digest")
        hashed = 0 if digest is None else hash(str(digest).encode())
        return float(record["samples"]), math.nan if loss is None else float(loss), hashed
    return None
