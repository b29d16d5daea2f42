"""The catalogue: every fault by name, what is done, and how each rank of that start must end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pretrain.drill import damage, disks, rivals
from pretrain.drill.scripts import (
    DONE,
    FAILED,
    KILLED,
    REFUSED,
    SAVED,
    Ends,
    chain,
    injected,
    paused,
    paused_for_ever,
    told_while_starting,
)
from pretrain.drill.trial import Script

DAY_S = 86_400
_SHORT = {
    *("kill-backward-rank[!0]*", "kill-writing-first-rank0", "kill-committing-enter-rank0", "kill-pruning-enter-rank0"),
    *("term-storm", "disk-full-rank1", "checkpoint-bit-flipped", "worker-killed"),
}
"""Patterns of names: what stands for its kind in the short drill."""


@dataclass(frozen=True)
class Fault:
    """One fault."""

    name: str
    what: str
    script: Script
    flags: tuple[str, ...] = ()
    """Knobs that it needs; they change no result."""
    source: str = "synthetic"
    """The data of the run: a name of `sources.SOURCES`."""

    @property
    def short(self) -> bool:
        """Whether it stands for its kind in the short drill."""
        return any(fnmatchcase(self.name, pattern) for pattern in _SHORT)


def catalogue(size: int) -> list[Fault]:
    """All faults of a run of `size` ranks."""
    parts = (_kills(size - 1), _signals(), _pauses(), _disks(), _surroundings(), _damage(), _rivals())
    return [fault for part in parts for fault in part]


def _kills(last: int) -> Iterator[Fault]:
    def kill(phase: str, rank: int, where: str = "", note: str = "", others: Ends = FAILED) -> Fault:
        name = "-".join(filter(None, ("kill", phase, note, f"rank{rank}")))
        what = (
            f"SIGKILL of rank {rank} in {phase}{' (' if where else ''}{where.replace(':', ', ')}{')' if where else ''}"
        )
        spec = ":".join(filter(None, (f"kill@{phase}", where, f"rank={rank}")))
        return Fault(name, what, injected(spec, KILLED, others))

    for phase in ("data", "text_tower", "loss", "exchange", "backward", "optimizer", "logging", "agreeing"):
        yield from (kill(phase, rank, "step=8") for rank in (0, last))
    for rank in (0, last):
        yield kill("start", rank, "edge=leave")
        yield kill("staging", rank, "step=5")
        yield kill("writing", rank, note="first")
        yield kill("writing", rank, "step=5:edge=leave", "later")
    yield kill("staging", last, "step=5:edge=leave", "leave")
    yield kill("committing", 0, note="first")
    for edge in ("enter", "leave"):
        yield kill("committing", 0, f"step=5:edge={edge}", edge)
        yield kill("pruning", 0, f"step=8:edge={edge}", edge)
    yield kill("committing", 0, "step=12", "last", others=(*FAILED, *DONE))
    yield Fault("kill-all", "SIGKILL of every rank at once", injected("kill@loss:step=8", KILLED))
    places = (f"writing:rank={last}", "committing:rank=0", "backward:step=5:rank=0", f"optimizer:step=4:rank={last}")
    yield Fault("kill-kill-kill-kill", "SIGKILL at four starts running", chain(*(f"kill@{place}" for place in places)))


def _signals() -> Iterator[Fault]:
    def told(name: str, what: str, spec: str, *flags: str) -> Fault:
        return Fault(name, what, injected(spec, SAVED), flags)

    yield told("term-one-rank", "SIGTERM to one rank alone", "term@backward:step=5:rank=1")
    yield told("term-storm", "50 SIGTERM to every rank and its workers", "storm@backward:step=5", "--data.workers", "1")
    yield told("term-starting", "SIGTERM while the run is built", "term@start")
    yield told("term-staging", "SIGTERM while a checkpoint is copied", "term@staging:step=5")
    yield told("term-writing", "SIGTERM while a checkpoint is written", "term@writing:step=5")
    yield told("int-twice", "Ctrl-C, and again while saving", "int@backward:step=5,int@staging:step=5")
    yield told("usr2-one-rank", "the stop signal to one rank alone", "usr2@backward:step=5:rank=1")
    importing = told_while_starting(signal.SIGTERM)
    yield Fault("term-importing", "SIGTERM to a user's own start while it imports", importing)


def _pauses() -> Iterator[Fault]:
    where = "pause@backward:step=5:rank=1"
    yield Fault("pause-short", "SIGSTOP of rank 1 for 2 s", paused(where, 2.0))
    yield Fault("pause-for-ever", "SIGSTOP of rank 1, never continued", paused_for_ever(where, 8))


def _disks() -> Iterator[Fault]:
    def refused(name: str, what: str, spec: str, says: str) -> Fault:
        return Fault(name, what, injected(spec, REFUSED, REFUSED, says))

    full = "No space left on device"
    yield refused("disk-full-rank0", "ENOSPC when rank 0 writes", "enospc@writing:step=5:rank=0", full)
    yield refused("disk-full-rank1", "ENOSPC when rank 1 writes", "enospc@writing:step=5:rank=1", full)
    yield refused("disk-failing", "EIO when rank 0 writes", "eio@writing:step=5:rank=0", "Input/output error")
    yield refused("disk-failing-commit", "EIO before COMMIT", "eio@committing:step=5:rank=0", "Input/output error")
    yield refused("disk-read-only", "EROFS when rank 1 writes", "erofs@writing:step=5:rank=1", "Read-only file system")
    yield refused("file-limit", "the kernel refuses to let a file grow", "fsize@writing:step=5:rank=0:value=65536", "")
    slow = injected("slow@writing:times=0:value=0.3", DONE)
    yield Fault("disk-slow", "every write of a checkpoint takes 0.3 s longer", slow)
    if disks.may_mount():
        yield Fault("disk-really-full", "a file system too small for two checkpoints", disks.full)
        yield Fault("disk-really-read-only", "a file system that turns read-only", disks.read_only)


def _surroundings() -> Iterator[Fault]:
    def survived(name: str, what: str, spec: str, *flags: str) -> Fault:
        return Fault(name, what, injected(spec, DONE), flags)

    for sign, word in ((1, "ahead"), (-1, "back")):
        jump = f"clock@backward:step=4:rank=0:value={sign * DAY_S}"
        yield survived(f"clock-{word}", f"rank 0's clock jumps a day {word}", jump)
    yield survived("wandb-broken", "every call of wandb raises", "wandb@start", "--log.wandb", "drill")
    broken = ("tensorboard@start", "--log.tensorboard", "true")
    yield survived("tensorboard-broken", "every write of TensorBoard raises", *broken)
    worker = injected("worker@backward:step=5:rank=1", FAILED, says="data.workers: worker 0 of rank 1")
    yield Fault("worker-killed", "SIGKILL of a decoding process of rank 1", worker, ("--data.workers", "1"))
    yield Fault("exception", "rank 1 raises in the loss", injected("raise@loss:step=5:rank=1", FAILED))
    yield Fault("shard-missing", "a shard is away when the run starts", disks.without("shards/*1.tar"), source="shards")
    flaky = injected("transfer@start:value=5", DONE, says="trying again")
    yield Fault("shard-unreadable", "the first five reads of remote shards fail", flaky, source="remote")


def _damage() -> Iterator[Fault]:
    def harmed(name: str, harm: damage.Harm, says: str = "") -> Fault:
        return Fault(name, harm.__doc__ or name, damage.damaged(harm, says))

    yield harmed("checkpoint-truncated", damage.truncate, "is damaged")
    yield harmed("checkpoint-bit-flipped", damage.flip, "is damaged")
    yield harmed("checkpoint-uncommitted", damage.uncommit, "COMMIT: missing")
    yield harmed("manifest-garbled", damage.garble_manifest, "is damaged")
    yield harmed("metrics-torn", damage.tear_metrics, "metrics.jsonl")
    yield harmed("leftovers", damage.litter)


def _rivals() -> Iterator[Fault]:
    yield Fault("two-starts", "a second start while the first one lives", rivals.second_start)
    for phase in ("backward", "writing", "committing"):
        what = f"a start that slept in {phase} wakes after a later one"
        yield Fault(f"zombie-{phase}", what, rivals.zombie(f"pause@{phase}:step=5:rank=0"))
