"""Stretches of the sample stream that a run leaves out: where its n-th sample then lies in the data order.

A pure function of the list, so that nothing but the list needs saving, and any number of ranks and workers agrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Stretch = tuple[int, int]
"""First position of the data order that is left out, and the first one that is not."""


def position(sample: int, left_out: Sequence[Stretch]) -> int:
    """Where the run's n-th sample lies in the data order.

    Args:
        sample: counted from 0 over those that the run takes.
        left_out: as `merged` gives them.
    """
    for start, stop in left_out:
        if sample < start:
            break
        sample += stop - start
    return sample


def merged(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """The same positions as stretches that rise and neither touch nor overlap."""
    found: list[Stretch] = []
    for start, stop in sorted(stretches):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)
