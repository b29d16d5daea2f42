"""Checks of what carries tensors between ranks: that they arrive as they were sent, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.doctor.base import Finding, Patient, Status

MIB = 1 << 20
SIZE, SIZE_CPU, TIMES = 64 * MIB, 2 * MIB, 5
"""Bytes of a message on a GPU and on the CPU; how often it is timed."""
SLOW, FLOOR = 0.25, 2.0
"""Share of the median link below which one is told; GB/s between GPU nodes that only a wrong network stays below."""


def all_reduce(patient: Patient) -> Iterator[Finding]:
    """A sum over all ranks, of whole numbers, which every order of adding gives exactly."""
    if patient.world.size == 1:
        yield Finding("all-reduce", "skipped: one rank", "skip")
        return
    world = patient.world
    pattern = _pattern(patient)
    shares = [rank % 8 + 1 for rank in range(world.size)]
    sent = pattern * shares[world.rank]
    dist.all_reduce(sent)
    right = torch.equal(sent, pattern * sum(shares))
    bytes_moved = 2 * (world.size - 1) / world.size * sent.numel() * sent.element_size()
    speed = _gb_per_s(lambda: dist.all_reduce(sent.zero_()), bytes_moved, patient)
    mend = "set NCCL_DEBUG=INFO and look at NVLink and the network cards of the slow nodes"
    across = len(set(patient.nodes)) > 1 and world.device.type == "cuda"
    slow = across and speed < FLOOR
    needed = "the right sum" + (f", {FLOOR:g} GB/s" if across else "")
    said = "right" if right else "wrong sums"
    if slow:
        mend = "NCCL uses a slow network: look at NCCL_SOCKET_IFNAME and NCCL_IB_HCA, and set NCCL_DEBUG=INFO"
    status: Status = "fail" if not right else "warn" if slow else "ok"
    yield Finding("all-reduce", said, status, needed, mend, amount=speed, unit="GB/s")


def ring(patient: Patient) -> Iterator[Finding]:
    """Every rank sends to the next: one message to each, all at once; what comes must be the sender's."""
    if patient.world.size == 1:
        yield Finding("ring", "skipped: one rank", "skip")
        return
    world, pattern = patient.world, _pattern(patient)
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    sent, received = pattern + world.rank, torch.empty_like(pattern)
    _pass_on(sent, after, received, before)
    right = torch.equal(received, pattern + before)
    moved = received.numel() * received.element_size()
    speed = _gb_per_s(lambda: _pass_on(sent, after, received, before), moved, patient)
    inside = patient.nodes[before] == patient.node
    name = "ring within a node" if inside else "ring between nodes"
    mend = "look at the cable, card or NVLink between this rank and the one before, or leave the node out"
    needed = f"what was sent, at {SLOW:.0%} of the median link"
    if right:
        yield Finding(name, "right", "ok", needed, mend, amount=speed, unit="GB/s", least=SLOW, unlike="warn")
    else:
        yield Finding(name, f"rank {before} sent something else", "fail", needed, mend)


def _pattern(patient: Patient) -> Tensor:
    """Whole numbers up to 6, fp32: sums of them, each up to eight times, are exact over 300,000 ranks."""
    device = patient.world.device
    size = SIZE if device.type == "cuda" else SIZE_CPU
    return (torch.arange(size // 4, device=device) % 7).float()


def _pass_on(sent: Tensor, after: int, received: Tensor, before: int) -> None:
    asked = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
    for work in dist.batch_isend_irecv(asked):
        work.wait()


def _gb_per_s(call: Callable[[], object], bytes_moved: float, patient: Patient) -> float:
    """Of the fastest of several calls: what the link can do, whatever else the machine does meanwhile."""
    fastest = float("inf")
    for _ in range(TIMES):
        dist.barrier(group=patient.world.group)
        began = time.perf_counter()
        call()
        if patient.world.device.type == "cuda":
            torch.cuda.synchronize(patient.world.device)
        fastest = min(fastest, time.perf_counter() - began)
    return bytes_moved / fastest / 1e9
