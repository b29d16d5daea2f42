"""Checks of the GPUs: that each rank has one, of one kind, and that they are well."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from pretrain.doctor import smi
from pretrain.doctor.base import Finding, Patient
from pretrain.doctor.smi import Gpu

HOT, BUSY = 85, 0.1
"""Degrees Celsius of a GPU that has nothing to do; share of its memory that others may hold."""


def gpus(patient: Patient) -> Iterator[Finding]:
    """The GPU of this rank, or the processor where there is none."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(patient.world.device)
        said = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        needed = "one for each rank, of one kind: another kind rounds otherwise, and all wait for the slowest"
        yield Finding("gpus", said, "ok", needed, "ask for nodes of one kind", alike=said, unlike="warn")
        return
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    asked = wants_cuda(patient)
    mend = "ask SLURM for GPUs, look at nvidia-smi, and install a torch built for CUDA; or change what is asked"
    said = f"skipped: no GPU is visible ({built}); {os.cpu_count()} CPU cores"
    yield Finding("gpus", said, "warn" if asked else "skip", f"one for {asked}" if asked else "", mend)


def health(patient: Patient) -> Iterator[Finding]:
    """Memory errors, clocks held down, heat, and memory that others hold, of this rank's GPU."""
    if not torch.cuda.is_available():
        yield Finding("gpu health", "skipped: no GPU is visible", "skip")
        return
    mine = str(torch.cuda.get_device_properties(patient.world.device).uuid)
    found = next((gpu for gpu in smi.gpus() if mine in gpu.uuid), None)
    if found is None:
        yield Finding("gpu health", "skipped: nvidia-smi does not tell of it", "skip")
        return
    yield from condition(found)


def condition(gpu: Gpu) -> Iterator[Finding]:
    """What is wrong with a GPU; one good finding where nothing is."""
    bad = list(_wrong(gpu))
    yield from bad
    if not bad:
        yield Finding("gpu health", "no errors, no brakes, nobody else", needed="the same")


def _wrong(gpu: Gpu) -> Iterator[Finding]:
    if gpu.uncorrected:
        said = f"{gpu.uncorrected:.0f} errors that ECC could not mend"
        yield Finding("gpu memory", said, "fail", "none", "reset or replace the GPU, and leave the node out")
    if gpu.pending:
        yield Finding("gpu memory", "a page waits to be retired", "fail", "none", "reset the GPU")
    if gpu.slowed:
        hard = any(not why.startswith("software") for why in gpu.slowed)
        said, mend = f"held down: {', '.join(gpu.slowed)}", "look at the node's cooling and power, and leave it out"
        yield Finding("gpu clocks", said, "fail" if hard else "warn", "not held down", mend)
    if gpu.temperature is not None and gpu.temperature > HOT:
        said, mend = f"{gpu.temperature:.0f} degrees Celsius while idle", "look at the node's cooling"
        yield Finding("gpu heat", said, "warn", f"at most {HOT}", mend)
    if gpu.used and gpu.total and gpu.used > BUSY * gpu.total:
        said = f"{gpu.used / 1024:.1f} of {gpu.total / 1024:.1f} GiB are held before the run begins"
        mend = "end what nvidia-smi shows there, or leave the node out"
        yield Finding("gpu in use", said, "fail", f"at most {BUSY:.0%}", mend)


def peers(patient: Patient) -> Iterator[Finding]:
    """Whether this rank's GPU reaches the memory of the others that it sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = patient.world.local_rank
    apart = [n for n in range(count) if n != own and not torch.cuda.can_device_access_peer(own, n)]
    if count < 2:
        yield Finding("gpu peers", f"skipped: {count} GPUs are visible", "skip")
    elif apart:
        said, mend = (
            f"cannot reach {len(apart)} of {count - 1} directly",
            "look at `nvidia-smi topo -p2p r` and ACS",
        )
        yield Finding("gpu peers", said, "warn", "every GPU of the node", mend)
    else:
        yield Finding("gpu peers", f"reaches all {count - 1} others", needed="every GPU of the node")


def wants_cuda(patient: Patient) -> str:
    """The knob that asks for a GPU; '': none does."""
    run = patient.config
    if run is None:
        return ""
    asked = {
        "model.speed cuda_graphs": "cuda_graphs" in run.model.speed,
        "loss.kernel triton": run.loss.kernel == "triton" and os.environ.get("TRITON_INTERPRET") != "1",
    }
    return next((knob for knob, does in asked.items() if does), "")
