"""What data.eval says: which samples are held out, and which tasks training measures on them."""

from __future__ import annotations

import re

from pretrain.config import Data
from pretrain.errors import UserError

_TASK = re.compile(r"([a-z_][\w.]*)=(\d+)")
"""'zero_shot=100000'."""


def entries(data: Data) -> tuple[str, ...]:
    """The entries that name data."""
    return tuple(entry for entry in data.eval if not _TASK.fullmatch(entry))


def in_training(data: Data) -> dict[str, int]:
    """Tasks that training measures, and after how many samples each time.

    Raises:
        UserError: a task is named twice, or without data, or after no samples.
    """
    found: dict[str, int] = {}
    for match in filter(None, map(_TASK.fullmatch, data.eval)):
        task, samples = match[1], int(match[2])
        if task in found or not samples:
            raise UserError(f"data.eval {match[0]}: name a task once, with the samples between two measurements")
        found[task] = samples
    if found and not entries(data) and data.synthetic is None:
        raise UserError(f"data.eval: {', '.join(found)} needs held-out data; name it there too")
    return found
