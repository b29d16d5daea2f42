"""The ranks of one node, started side by side and ended as one process, whoever placed the node.

torchrun's agent ends with 1 whatever its ranks ended with; Kubernetes and SkyPilot would take a stop with a checkpoint
for a failure, and repeat a mistake. This one ends with the run's own exit code. It restarts nothing: who placed the
node does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from pretrain.errors import DONE, REQUEUE, UserError

PORT, LAST_S, POLL_S = 29500, 60.0, 0.1
"""Where ranks of several nodes meet; how long others may go on when one has failed; how often is looked."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_KNOWN = {
    "nodes": ("PET_NNODES", "SKYPILOT_NUM_NODES"),
    "node": ("PET_NODE_RANK", "SKYPILOT_NODE_RANK", "JOB_COMPLETION_INDEX"),
    "ranks_per_node": ("PET_NPROC_PER_NODE", "SKYPILOT_NUM_GPUS_PER_NODE"),
    "port": ("PET_MASTER_PORT",),
}
"""Variables by which Kubeflow's Trainer, SkyPilot and Kubernetes tell a node its place; the first one set counts."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """Options of `pretrain launch node`; none: what the environment says, otherwise one node."""

    nodes: int | None = None
    """Nodes of the run: PET_NNODES, SKYPILOT_NUM_NODES."""
    node: int | None = None
    """Number of this one: PET_NODE_RANK, SKYPILOT_NODE_RANK, JOB_COMPLETION_INDEX."""
    ranks_per_node: int | None = None
    """Ranks on each: PET_NPROC_PER_NODE, SKYPILOT_NUM_GPUS_PER_NODE."""
    head: str | None = None
    """Name or address of node 0: PET_MASTER_ADDR, the first of SKYPILOT_NODE_IPS."""
    port: int | None = None
    """Port of node 0 where ranks meet: PET_MASTER_PORT, or 29500; one node takes a free one."""


@dataclass(frozen=True)
class Place:
    """Where the ranks of this node stand in the run."""

    nodes: int
    node: int
    ranks: int
    head: str
    port: int

    def environment(self, local_rank: int) -> dict[str, str]:
        """What a rank is told, in the words of torch."""
        told = {
            "RANK": self.node * self.ranks + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self.nodes * self.ranks,
            "LOCAL_WORLD_SIZE": self.ranks,
            "MASTER_ADDR": self.head,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in told.items()}


def place(options: Node, environment: Mapping[str, str]) -> Place:
    """Where this node stands: by the options, then by the environment.

    Raises:
        UserError: something is missing, is no number, or does not fit.
    """
    found = {name: _number(options, name, environment) for name in _KNOWN}
    nodes, node, ranks = found["nodes"] or 1, found["node"] or 0, found["ranks_per_node"]
    if not ranks or ranks < 1:
        raise UserError(f"ranks_per_node {ranks}: say how many ranks this node runs, as in --ranks-per-node 8")
    if nodes < 1 or not 0 <= node < nodes:
        raise UserError(f"node {node} of {nodes}: nodes count from 0; name both with --node and --nodes")
    if nodes == 1:
        return Place(1, 0, ranks, "127.0.0.1", found["port"] or _free_port())
    first = next(iter(environment.get("SKYPILOT_NODE_IPS", "").split()), None)
    head = options.head or environment.get("PET_MASTER_ADDR") or first
    if head is None:
        raise UserError(f"nodes {nodes} have to find each other: name node 0 with --head HOST")
    return Place(nodes, node, ranks, head, found["port"] or PORT)


def run(where: Place, program: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start the ranks of this node and wait for them.

    Args:
        program: of a rank, and its arguments.

    Returns:
        The exit code of the rank that first ended otherwise than DONE; DONE where all did.
    """
    own = {name: value for name, value in environment.items() if name != "TORCHELASTIC_RUN_ID"}
    own |= {} if where.ranks == 1 else {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    ranks = Ranks()
    before = {number: signal.signal(number, ranks.tell) for number in PASSED_ON}
    try:
        for local_rank in range(where.ranks):
            ranks.start(program, own | where.environment(local_rank))
        return ranks.wait()
    finally:
        ranks.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


class Ranks:
    """Processes that live and end together."""

    def __init__(self) -> None:
        self.asked = False
        """Whether a signal has come."""
        self._running: list[subprocess.Popen[bytes]] = []
        self._code: int | None = None
        """Of the rank that first ended otherwise than DONE, or DONE."""

    def start(self, program: Sequence[str], environment: Mapping[str, str]) -> None:
        """One more rank, unless all are asked to stop already."""
        if not self.asked:
            self._running.append(subprocess.Popen(program, env=dict(environment)))

    def tell(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on."""
        self.asked = True
        for process in self._running:
            process.send_signal(number)

    def wait(self) -> int:
        """Until all have ended; a minute after one has failed the others are killed. The exit code of all."""
        deadline: float | None = None
        while self._running:
            self._look()
            if deadline is None and self._code not in (None, DONE, REQUEUE):
                deadline = time.monotonic() + LAST_S
            if deadline is not None and time.monotonic() > deadline:
                _say(f"{len(self._running)} ranks go on {LAST_S:g} s after one has failed: killed")
                self.kill()
            time.sleep(POLL_S)
        return REQUEUE if self._code is None else self._code  # none was started: a signal came before

    def kill(self) -> None:
        """End those that are left."""
        for process in self._running:
            process.kill()
            process.wait()
        self._running = []

    def _look(self) -> None:
        for process in list(self._running):
            if (code := process.poll()) is not None:
                self._running.remove(process)
                self._count(code)

    def _count(self, code: int) -> None:
        if code < 0:
            _say(f"a rank was ended by {signal.Signals(-code).name}")
        if self.asked and code == -signal.SIGTERM:
            code = REQUEUE  # it came before the rank could hear: nothing is lost
        if self._code in (None, DONE):
            self._code = code if code >= 0 else 128 - code


def _number(options: Node, name: str, environment: Mapping[str, str]) -> int | None:
    given: int | None = getattr(options, name)
    if given is not None:
        return given
    variable = next((variable for variable in _KNOWN[name] if variable in environment), None)
    if variable is None:
        return None
    if not environment[variable].isdigit():
        raise UserError(f"{variable} {environment[variable]!r} is no number; say it with --{name.replace('_', '-')}")
    return int(environment[variable])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _say(line: str) -> None:
    print(f"pretrain launch node: {line}", file=sys.stderr, flush=True)


def program(config: str, knobs: Sequence[str]) -> list[str]:
    """A rank: this very interpreter and package."""
    return [sys.executable, "-m", "pretrain", "train", config, *knobs]


def main(options: Node, config: str, knobs: Sequence[str]) -> int:
    """`pretrain launch node`."""
    return run(place(options, os.environ), program(config, knobs), os.environ)
