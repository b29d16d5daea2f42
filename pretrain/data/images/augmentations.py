"""What data.augment and data.view_augment may name. No torch and no Pillow: rules.py checks the knobs with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

STRENGTHS = ("color_jitter",)
"""name=S: brightness, contrast and saturation change by up to a share S, the hue by up to S / 4 of the circle."""
CHANCES = ("grayscale", "blur", "solarize", "autocontrast", "erase")
"""name=P: done to a share P of the images."""


def parse(entry: str) -> tuple[str, float]:
    """'NAME=NUMBER' as a pair. ValueError: the rule that it breaks and the fix, in a few words."""
    name, _, text = entry.partition("=")
    if name not in STRENGTHS + CHANCES:
        raise ValueError(f"{entry!r} names no augmentation: write NAME=NUMBER with {', '.join(STRENGTHS + CHANCES)}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:  # also where it is not a number
        what = "a strength" if name in STRENGTHS else "a chance"
        raise ValueError(f"{entry!r} must give {what} between 0 and 1, such as {name}=0.4")
    return name, number


def problems(field: str, entries: Sequence[str]) -> list[str]:
    """A sentence for each entry of a knob that is no augmentation."""
    found = []
    for entry in entries:
        try:
            parse(entry)
        except ValueError as mistake:
            found.append(f"{field} {mistake}")
    return found
