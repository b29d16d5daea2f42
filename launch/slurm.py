"""SLURM: one readable batch script, and its submission."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.errors import UserError
from pretrain.launch import sbatch, slurm_script
from pretrain.launch.job import Job, Machines

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|infinite", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Slurm(Machines):
    """Options of `pretrain launch slurm`."""

    form: Literal["srun", "torchrun", "deepspeed"] = "srun"
    """What starts the ranks: srun itself, or an agent on each node."""
    time: str | None = None
    """Time limit, as sbatch writes it: minutes, H:MM:SS, D-HH:MM:SS; none: the partition's."""
    grace_s: int = 120
    """Seconds before the time limit at which the run is asked to stop: long enough for a step and a checkpoint."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    cpus_per_rank: int | None = None
    """CPU cores for each rank and its decoding processes."""
    mem: str | None = None
    """Memory of each node, such as 400G; 0: all of it."""
    exclusive: bool = False
    """Share the nodes with nobody."""
    exclude: tuple[str, ...] = ()
    """Nodes to leave out, beside those that a check has found bad."""
    directives: tuple[str, ...] = ()
    """Further options of sbatch, without dashes: mail-type=END."""
    seeds: tuple[int, ...] = ()
    """A run for each of these seeds, as one job array; each has its own folder, NAME-seedN."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the run: module load cuda/12.8."""
    environment: tuple[str, ...] = ()
    """Variables of the ranks: NAME=VALUE."""
    preflight: str = "doctor"
    """What checks the nodes before the run; those at fault are left out at the next attempt. doctor: `pretrain doctor`
    on every rank; none: nothing; anything else: a command, once on each node."""
    container: str | None = None
    """Image in which the ranks run."""
    container_tool: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs it."""
    mounts: tuple[str, ...] = ()
    """Folders that the container sees, beside those of the job: HOST:CONTAINER."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for broken, sentence in self._rules():
            if broken:
                raise UserError(sentence)

    def _rules(self) -> list[tuple[bool, str]]:
        bad_variables = [item for item in self.environment if not re.match(r"[A-Za-z_]\w*=", item)]
        dashed = [item for item in self.directives if item.startswith("-")]
        spaced = [item for item in self._words() if re.search(r"[\s,\"']", item)]
        return [
            (self.time is not None and not _TIME.fullmatch(self.time), f"time {self.time!r}: write H:MM:SS"),
            (self.grace_s < 1, f"grace_s {self.grace_s} must be 1 or more"),
            ((self.cpus_per_rank or 1) < 1, f"cpus_per_rank {self.cpus_per_rank} must be 1 or more"),
            (bool(dashed), f"directives {dashed}: leave the dashes out, as in mail-type=END"),
            (bool(bad_variables), f"environment {bad_variables}: write NAME=VALUE"),
            (bool(spaced), f"{spaced}: names of nodes, partitions and accounts have no spaces, quotes or commas"),
            (len(set(self.seeds)) < len(self.seeds), f"seeds {list(self.seeds)}: each may be listed once"),
            (any(seed < 0 for seed in self.seeds), f"seeds {list(self.seeds)}: SLURM numbers from 0"),
            (bool(self.mounts) and self.container is None, f"mounts {list(self.mounts)}: name the container too"),
        ]

    def _words(self) -> list[str]:
        return [item for item in (self.partition, self.account, self.qos, self.mem) if item is not None]


def render(options: Slurm, job: Job, folder: Path) -> str:
    """The batch script.

    Args:
        folder: what belongs to this submission: script, logs, the frozen code and config.
    """
    return "\n".join([*header(options, job, folder), "", *slurm_script.body(options, job, folder), ""])


def header(options: Slurm, job: Job, folder: Path) -> list[str]:
    """The lines that sbatch reads. Only the batch shell hears of the time limit: it knows whom to tell."""
    per_node = options.ranks if options.form == "srun" else 1
    cores = options.cpus_per_rank and options.cpus_per_rank * options.ranks // per_node
    excluded = sorted({*options.exclude, *bad_nodes(job)})
    asked: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("nodes", options.nodes),
        ("ntasks-per-node", per_node),
        ("gpus-per-node", options.gpus_per_node or None),
        ("cpus-per-task", cores),
        *[(name, getattr(options, name)) for name in ("mem", "time", "partition", "account", "qos", "constraint")],
        ("exclude", ",".join(excluded) or None),
        ("array", ",".join(map(str, options.seeds)) or None),
        ("chdir", job.work_folder),
        ("output", f"{str(folder).replace('%', '%%')}/log-%j.txt"),
        ("open-mode", "append"),
        ("signal", f"B:USR2@{options.grace_s}"),
    ]
    lines = [f"{name}={sbatch.quoted(value)}" for name, value in asked if value is not None]
    lines += ["requeue", *(["exclusive"] if options.exclusive else []), *options.directives]
    return ["#!/bin/bash", *(f"#SBATCH --{line}" for line in lines)]


def submit(script: Path) -> str:
    """Hand a script to SLURM; the number of the job.

    Raises:
        UserError: there is no SLURM here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on the PATH: submit on a login node of the cluster, or look with --dry-run")
    variables = sbatch.environment(script.read_text(), os.environ)
    done = subprocess.run(["sbatch", "--parsable", str(script)], env=variables, capture_output=True, text=True)
    if done.returncode:
        left_out = re.findall("^#SBATCH --exclude=(.*)", script.read_text(), re.MULTILINE)
        nodes = f"; left out: {left_out[0]}; RUN/launch/bad_nodes names those found bad" if left_out else ""
        raise UserError(f"sbatch refuses {script}: {' '.join(done.stderr.split())}{nodes}")
    return done.stdout.split(";")[0].strip()


def log_of(options: Slurm, folder: Path, number: str) -> str:
    """Where a job writes; each run of an array has its own file."""
    return f"{folder}/log-{'*' if options.seeds else number}.txt"


def bad_nodes(job: Job) -> list[str]:
    """Nodes that a check has found bad in earlier attempts: each is a file in RUN/launch/bad_nodes."""
    folder = slurm_script.bad_folder(job)
    return sorted(path.name for path in folder.glob("[!.]*"))
