"""CPU cores that keep GPUs fed, from the measured speed of the data path."""

from __future__ import annotations

import math

DECODED = {"512x384": 401.6, "1024x768": 297.7}
"""JPEGs a second of one core (read, decoded, cropped to 224 pixels, tokenized), by pixels of the stored image; measured
with two workers: benchmarks/results/data_cpu.json."""
MEASURED_ON = "a core of a cloud machine's AMD EPYC"


def cores(samples_per_s: float, stored: str = "512x384") -> int:
    """That decode so many samples a second."""
    return math.ceil(samples_per_s / DECODED[stored])
