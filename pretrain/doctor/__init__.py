"""`pretrain doctor CONFIG`: what of this machine and this config works, what does not, and why; nothing is trained.

A check is a function in `CHECKS`: it takes a run and yields findings. One that raises a UserError has failed.
"""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config import Run
from pretrain.doctor import environment, towers
from pretrain.doctor.base import Check, Finding
from pretrain.errors import UserError

CHECKS: tuple[Check, ...] = (
    environment.versions,
    environment.devices,
    towers.build,
    towers.speed,
    towers.graph_breaks,
)


def examine(run: Run, checks: tuple[Check, ...] = CHECKS) -> list[Finding]:
    """Every finding of every check, in order."""
    return [finding for check in checks for finding in _findings(check, run)]


def _findings(check: Check, run: Run) -> Iterator[Finding]:
    try:
        yield from check(run)
    except UserError as mistake:
        yield Finding(check.__name__, str(mistake), "fail")
