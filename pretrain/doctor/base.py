"""What a check finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.config import Run

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    """What was looked at."""
    finding: str
    """What there is, and where that is wrong, how to mend it."""
    status: Status
    """warn: the run works, but not as well as it could; fail: it does not."""


Check = Callable[[Run], Iterator[Finding]]
