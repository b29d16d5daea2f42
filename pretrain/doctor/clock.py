"""Check of the clocks: the first rank asks each other one for its time, and takes half of the way off."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from pretrain.doctor.base import Finding, Patient
from pretrain.world import World

LIMIT_S, ROUNDS = 5.0, 5


def skew(patient: Patient) -> Iterator[Finding]:
    """How far this rank's clock is from most others'."""
    world = patient.world
    if world.size == 1:
        yield Finding("clock", "skipped: one rank", "skip")
        return
    offsets = [_ask(world, rank) for rank in range(1, world.size)] if world.is_main else []
    if not world.is_main:
        _answer(world)
    yield judge(world.share([0.0, *offsets])[0], world.rank)


def judge(offsets: Sequence[float], rank: int) -> Finding:
    """A clock is right that agrees with more than half of all.

    Args:
        offsets: of each rank's clock to the first's, in seconds.
    """
    near = sum(abs(offset - offsets[rank]) <= LIMIT_S for offset in offsets)
    middle = sorted(offsets)[(len(offsets) - 1) // 2]
    good, away = 2 * near > len(offsets), abs(offsets[rank] - middle)
    needed, mend = f"within {LIMIT_S:g} s of most", "let chrony or ntpd set the node's clock"
    said = "as most" if good else f"agrees with {near} of {len(offsets)} ranks"
    return Finding("clock", said, "ok" if good else "fail", needed, mend, amount=away, unit="s away")


def _ask(world: World, rank: int) -> float:
    """Offset of a rank's clock, from the round trip that was the quickest, in seconds."""
    found = []
    for _ in range(ROUNDS):
        told = torch.zeros(1, dtype=torch.float64)
        began = time.time()
        dist.send(told, rank, group=world.group)
        dist.recv(told, rank, group=world.group)
        ended = time.time()
        found.append((ended - began, float(told) - (began + ended) / 2))
    return min(found)[1]


def _answer(world: World) -> None:
    told = torch.zeros(1, dtype=torch.float64)
    for _ in range(ROUNDS):
        dist.recv(told, 0, group=world.group)
        dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=world.group)
