"""Docker, or podman: the ranks of one machine in a container of the image that docker/Dockerfile makes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.errors import UserError
from pretrain.launch import shell
from pretrain.launch.job import Job, Machines
from pretrain.launch.shell import Shell

_SIZE, _VARIABLE = re.compile(r"\d+[kmgKMG]?"), re.compile(r"[A-Za-z_]\w*(=.*)?")
_MOUNT = re.compile(r"[^:]+:/[^:]+(:ro)?")


@dataclass(frozen=True, kw_only=True)
class Docker(Machines):
    """Options of `pretrain launch docker`."""

    image: str = "pretrain"
    """Image, with the entry point of docker/Dockerfile."""
    tool: Literal["docker", "podman"] = "docker"
    """What runs it."""
    shm: str = "16g"
    """Shared memory, through which decoded images and NCCL's data go."""
    grace_s: int = 120
    """Seconds from `docker stop` until it kills: long enough for a step and a checkpoint."""
    mounts: tuple[str, ...] = ()
    """Folders that the container sees, beside that of the job and that of its runs: HOST:CONTAINER[:ro]."""
    environment: tuple[str, ...] = ()
    """Variables of the ranks: NAME=VALUE, or NAME for the value that it has here."""
    max_restarts: int = 0
    """Docker would repeat a mistake as it repeats a failure: 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("mounts", self.mounts), ("environment", self.environment)):
            rule, words = (_MOUNT, "HOST:CONTAINER") if name == "mounts" else (_VARIABLE, "NAME=VALUE")
            if wrong := [item for item in value if not rule.fullmatch(item)]:
                raise UserError(f"{name} {wrong}: write {words}")
        if self.nodes > 1:
            raise UserError(f"nodes {self.nodes}: Docker runs one machine; several are for slurm, kubernetes, skypilot")
        if self.max_restarts:
            raise UserError(f"max_restarts {self.max_restarts}: a container is not restarted; start it again by hand")
        if not _SIZE.fullmatch(self.shm):
            raise UserError(f"shm {self.shm!r}: write a size, as in 16g")
        if self.grace_s < 1:
            raise UserError(f"grace_s {self.grace_s} must be 1 or more")


def command(options: Docker, job: Job) -> list[str]:
    """The command of this machine."""
    return [word for part in _parts(options, job, f"{os.getuid()}:{os.getgid()}") for word in part]


def render(options: Docker, job: Job) -> str:
    """The command as shell, an option a line."""
    return shell.command(*_parts(options, job, Shell('"$(id -u):$(id -g)"'))) + "\n"


def name_of(job: Job) -> str:
    """The run's name as Docker allows it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", job.name).lstrip("-._") or "pretrain"


def _parts(options: Docker, job: Job, user: str) -> list[list[str]]:
    podman = options.tool == "podman"
    return [
        [options.tool, "run", "--rm", f"--name={name_of(job)}"],
        ["--device=nvidia.com/gpu=all" if podman else "--gpus=all"] if options.gpus_per_node else [],
        [f"--shm-size={options.shm}", "--ulimit=memlock=-1", "--ulimit=stack=67108864"],
        [f"--stop-timeout={options.grace_s}"],
        ["--user", user, *(["--userns=keep-id"] if podman else [])],
        *(["--volume", mount] for mount in _mounts(options, job)),
        ["--workdir", str(job.work_folder)],
        *(["--env", variable] for variable in options.environment),
        [options.image],
        ["launch", "node", str(job.config), "--ranks-per-node", str(options.ranks), *job.flags],
    ]


def _mounts(options: Docker, job: Job) -> list[str]:
    """The folder of the job, and those of its runs and config, at the paths that they have outside."""
    work = job.work_folder
    config = (work / job.config).parent
    inside = [work, *([] if job.run_folder.is_relative_to(work) else [job.run_folder.parent])]
    own = [f"{path}:{path}" for path in inside]
    return [*own, *([] if _covered(config, inside) else [f"{config}:{config}:ro"]), *options.mounts]


def _covered(path: Path, folders: list[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
