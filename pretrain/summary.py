"""What a start of a run is, in one line for the person and one event for `pretrain status`: from the built parts, so
that what `auto` has become is told, and not that it was asked for."""

from __future__ import annotations

import logging
import socket
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from pretrain.history import endings

if TYPE_CHECKING:
    from pretrain.train import Training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """One start of a run."""

    ranks: int
    nodes: int
    device: str
    engine: str
    exchange: str
    global_batch: int
    micro_batch: int
    """Pairs of a rank in one pass of the towers."""
    total_samples: int
    """Length of the run, in whole steps."""
    step: int
    """Optimizer steps done before."""
    folder: str
    checkpoints: str | None
    """Where checkpoints go; None: into the folder."""

    @property
    def line(self) -> str:
        """All of it in one line."""
        share = self.global_batch // self.ranks
        parts = f" ({share // self.micro_batch} x {self.micro_batch} a forward)" if self.micro_batch < share else ""
        batch = f"batch {self.global_batch} = {_count(self.ranks, 'rank')} x {share}{parts}"
        steps = self.total_samples // self.global_batch
        length = f"{self.total_samples:,} samples = {_count(steps, 'step')}, from step {self.step}"
        where = f"writes to {self.folder}" + (f", checkpoints to {self.checkpoints}" if self.checkpoints else "")
        ranks = f"{_count(self.ranks, 'rank')} on {_count(self.nodes, 'node')} ({self.device})"
        return f"{ranks}, {self.engine}, {self.exchange}; {batch}; {length}; {where}"


def tell(training: Training) -> Summary:
    """What this start is, said once by the first rank. Collective."""
    world, run = training.world, training.run
    elsewhere = None if run.checkpoint.to is None else str(training.homes[0])
    found = Summary(
        ranks=world.size,
        nodes=len(set(world.share(socket.gethostname()))),
        device=_name(world.device),
        engine=_file_of(training.engine),
        exchange=_file_of(training.exchange),
        global_batch=run.train.global_batch,
        micro_batch=run.train.micro_batch or run.train.global_batch // world.size,
        total_samples=training.total_samples,
        step=training.step,
        folder=str(run.path),
        checkpoints=elsewhere,
    )
    if world.is_main:
        log.info("%s", found.line)
    return found


def facts(summary: Summary, training: Training) -> dict[str, Any]:
    """What the event of a start holds beside its processes: the summary, and how the start before has ended."""
    told = asdict(summary) | {"step": training.step}
    return told | {"before": endings.before(training.run.path) if training.world.is_main else None}


def _file_of(part: object) -> str:
    """The name of a method is that of its file."""
    return type(part).__module__.rpartition(".")[2]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
