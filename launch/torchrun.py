"""torchrun: one agent a node starts the ranks, and starts them again when one dies."""

from __future__ import annotations

import shlex
import zlib
from dataclasses import dataclass
from itertools import chain

from pretrain.errors import UserError
from pretrain.launch.job import Job, Machines


@dataclass(frozen=True, kw_only=True)
class Torchrun(Machines):
    """Options of `pretrain launch torchrun`."""

    head: str | None = None
    """Name or address of the first node, which the others can reach; one node needs none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes > 1 and self.head is None:
            raise UserError(f"nodes {self.nodes} have to find each other: name the first with --head HOST")


def command(options: Torchrun, job: Job) -> list[str]:
    """The command of every node, the same on each; the port is a free one, or for several nodes the run's."""
    meeting = ["--standalone"] if options.nodes == 1 else rendezvous(f"{options.head}:{port_of(job)}", job.name)
    return [options.python, *chain.from_iterable(agent(options, meeting)), *job.words]


def render(options: Torchrun, job: Job) -> str:
    """The command as one line of shell."""
    return shlex.join(command(options, job)) + "\n"


def agent(options: Machines, meeting: list[str]) -> list[list[str]]:
    """torchrun and its options, a part a line, up to the program that it runs."""
    size = ["--nnodes", str(options.nodes), "--nproc-per-node", str(options.ranks)]
    return [["-m", "torch.distributed.run", *size], meeting, ["--max-restarts", str(options.max_restarts), "-m"]]


def rendezvous(endpoint: str, name: str) -> list[str]:
    """Options by which the agents of several nodes find each other."""
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", name]


def port_of(job: Job) -> int:
    """A port below those that systems hand out, alike on every node; two runs rarely share one."""
    return 10_000 + zlib.crc32(str(job.run_folder).encode()) % 20_000
