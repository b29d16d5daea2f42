"""DeepSpeed's launcher, with a file of hosts instead of ssh: the same command on every node."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pretrain.errors import UserError
from pretrain.launch import shell
from pretrain.launch.job import Job, Machines
from pretrain.launch.shell import Shell
from pretrain.launch.torchrun import port_of


@dataclass(frozen=True, kw_only=True)
class DeepSpeed(Machines):
    """Options of `pretrain launch deepspeed`."""

    hosts: tuple[str, ...] = ()
    """Names of the nodes, the first being the head; none: this machine."""
    max_restarts: int = 0
    """DeepSpeed's launcher does not restart: 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_restarts:
            raise UserError(f"max_restarts {self.max_restarts}: DeepSpeed's launcher does not restart; use torchrun")
        if (len(self.hosts) or 1) != self.nodes:
            raise UserError(f"hosts {list(self.hosts)}: name each of the {self.nodes} nodes")
        if len(set(self.hosts)) < len(self.hosts):
            raise UserError(f"hosts {list(self.hosts)}: each may be named once")


def hostfile(options: DeepSpeed) -> str:
    """A line a node: its name, and how many ranks it runs."""
    return "".join(f"{host} slots={options.ranks}\n" for host in options.hosts or ("localhost",))


def hostfile_path(job: Job) -> Path:
    """Where `hostfile` is kept: every node has to see it."""
    return job.run_folder / "launch" / "hostfile"


def command(options: DeepSpeed, job: Job) -> list[str]:
    """The command of every node; '$NODE_RANK' stands for the node's number, 0 for the first of `hosts`."""
    where = ["--master_port", str(port_of(job) if options.nodes > 1 else free_port())]
    if options.nodes > 1:
        where += ["--master_addr", options.hosts[0], "--node_rank", "$NODE_RANK", "--no_ssh"]
    else:
        where += ["--master_addr", "127.0.0.1", "--no_ssh_check"]  # one node, which needs no ssh
    return [options.python, *chain.from_iterable(runner(str(hostfile_path(job)), where)), *job.words]


def render(options: DeepSpeed, job: Job) -> str:
    """The file of hosts and the command, as a script of shell."""
    words = [Shell(f'"{word}"') if word == "$NODE_RANK" else word for word in command(options, job)]
    path = hostfile_path(job)
    file = f"cat > {shell.line([str(path)])} <<'HOSTS'\n{hostfile(options)}HOSTS"
    return f"{shell.line(['mkdir', '-p', str(path.parent)])}\n{file}\n{shell.line(words)}\n"


def runner(hosts: str, where: list[str]) -> list[list[str]]:
    """DeepSpeed's launcher and its options, a part a line, up to the program that it runs."""
    # Without --no_local_rank every program gets a flag --local_rank beside the variable LOCAL_RANK.
    return [["-m", "deepspeed.launcher.runner", "--hostfile", hosts], where, ["--no_local_rank", "--module"]]


def free_port() -> int:
    """A port of this machine that nobody holds now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
