"""Checks of the node: limits, shared memory, cores, names."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from pretrain.doctor.base import Finding, Patient, Status

FILES, FILES_FEWEST = 4096, 256
"""Open files: below the first shards are opened again and again, below the second a start fails."""
SHARED = 256 << 20
"""Bytes of /dev/shm for each rank: NCCL's buffers between the GPUs of a node."""


def limits(patient: Patient) -> Iterator[Finding]:
    """ulimit -n, ulimit -l, /dev/shm."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield open_files(files)
    if patient.world.device.type != "cuda":
        yield Finding("locked memory", "skipped: only network cards of GPU nodes need it", "skip")
        yield Finding("shared memory", "skipped: decoding needs none, and there is no GPU", "skip")
        return
    locked, mend = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], "ulimit -l unlimited, or --ulimit memlock=-1"
    free = locked == resource.RLIM_INFINITY
    said = "unlimited" if free else f"{locked >> 10} KiB"
    several = len(set(patient.nodes)) > 1
    yield Finding("locked memory", said, "ok" if free or not several else "warn", "unlimited for InfiniBand", mend)
    if Path("/dev/shm").is_dir():
        yield shared_memory(shutil.disk_usage("/dev/shm").free, patient.neighbours)


def open_files(limit: int) -> Finding:
    """Of ulimit -n."""
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", "unlimited", needed=f"{FILES}")
    status: Status = "ok" if limit >= FILES else "warn" if limit >= FILES_FEWEST else "fail"
    return Finding("open files", f"{limit}", status, f"{FILES}", f"ulimit -n {FILES}, or --ulimit nofile={FILES}")


def shared_memory(free: int, ranks: int) -> Finding:
    """Of the free bytes in /dev/shm and the ranks on the node."""
    needed = SHARED * ranks
    mend = f"--shm-size={needed >> 20}m or --ipc=host for the container"
    good = free >= needed or ranks == 1
    return Finding("shared memory", f"{free >> 20} MiB", "ok" if good else "warn", f"{needed >> 20} MiB", mend)


def cores(patient: Patient) -> Iterator[Finding]:
    """Cores that this rank may use, against the processes that will want them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = patient.config.data.workers if patient.config else 0
    # Ranks that SLURM binds have cores of their own; others share the node's.
    bound = usable < (os.cpu_count() or 1)
    ranks = 1 if bound else patient.neighbours
    wanted = ranks * (1 + workers)
    said = f"{usable} for {ranks} rank(s) with {workers} workers each"
    mend = "ask for more cores (--cpus-per-rank), or lower data.workers"
    yield Finding("cores", said, "ok" if usable >= wanted else "warn", f"{wanted}", mend)
    threads = int(asked) if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdigit() else torch.get_num_threads()
    if asked and threads * ranks > usable:
        mend = f"OMP_NUM_THREADS={max(1, usable // ranks)}, or leave it unset"
        yield Finding("threads", f"OMP_NUM_THREADS={threads} for {ranks} rank(s)", "warn", f"{usable} in all", mend)


def names(patient: Patient) -> Iterator[Finding]:
    """Whether the node's own name, and the address where the ranks meet, can be resolved."""
    own = socket.gethostname()
    # Gloo listens on the address of the host's name unless an interface is named.
    yield resolves("host name", own)
    if patient.world.size > 1 and (meeting := os.environ.get("MASTER_ADDR")):
        yield resolves("MASTER_ADDR", meeting)


def resolves(what: str, name: str) -> Finding:
    """A warning where a name has no address: the ranks have met all the same."""
    mend = f"add {name} to /etc/hosts or the name server, or set GLOO_SOCKET_IFNAME"
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return Finding(what, f"{name}: {error.strerror}", "warn", "has an address", mend)
    return Finding(what, "has an address", "ok", "has an address", mend)
