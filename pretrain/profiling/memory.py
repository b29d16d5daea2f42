"""How much memory each phase needs, from the allocations that a profile has seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """Of `size` bytes, or a release of -`size`."""

    at_ns: int
    size: int


@dataclass(frozen=True)
class Range:
    """A phase's time."""

    name: str
    start_ns: int
    end_ns: int


@dataclass
class Use:
    """Of memory, by one phase; all its times together."""

    peak_bytes: int
    """Most that was held while it was the innermost phase."""
    grown_bytes: int
    """Allocated less released in it."""


NOWHERE = "other"
"""Allocations outside of every phase."""


def by_phase(allocations: Iterable[Allocation], ranges: Iterable[Range], held: int = 0) -> dict[str, Use]:
    """Memory of each phase: an allocation belongs to the innermost range that it falls into.

    Args:
        held: bytes before the first allocation.
    """
    found: dict[str, Use] = {}
    waiting = sorted(ranges, key=lambda one: one.start_ns, reverse=True)
    inside: list[Range] = []
    for one in sorted(allocations, key=lambda one: one.at_ns):
        while waiting and waiting[-1].start_ns <= one.at_ns:
            inside.append(waiting.pop())
        inside = [each for each in inside if each.end_ns > one.at_ns]
        held = max(held + one.size, 0)  # less than nothing: it was allocated before the first one that was seen
        use = found.setdefault(inside[-1].name if inside else NOWHERE, Use(held, 0))
        use.peak_bytes, use.grown_bytes = max(use.peak_bytes, held), use.grown_bytes + one.size
    return found
