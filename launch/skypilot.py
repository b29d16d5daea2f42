"""SkyPilot: a managed job on rented machines, with the resolved config inside and checkpoints in a bucket.

Each machine runs `pretrain launch node`, which ends with the run's exit code. SkyPilot starts the job again when a
machine is taken away, and on exit code 85, without counting; other failures count against `max_restarts`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import REQUEUE, UserError
from pretrain.launch import shell, yaml_text
from pretrain.launch.job import Job, Machines

TOOL = "sky"
_GPU, _NAME = re.compile(r"[A-Za-z][\w.-]*(:\d+)?"), re.compile(r"[A-Za-z_]\w*")
_END = "END_OF_CONFIG"
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}


@dataclass(frozen=True, kw_only=True)
class SkyPilot(Machines):
    """Options of `pretrain launch skypilot`."""

    gpu: str | None = None
    """GPUs of each machine, as NAME:COUNT: H100:8; none: CPUs, with --gpus-per-node 0 --ranks-per-node N."""
    bucket: str | None = None
    """URL that checkpoints go to, such as s3://bucket/runs: a machine that is taken away takes its disk along."""
    spot: bool = False
    """Take machines that may be taken away at any time, at a lower price."""
    infra: str | None = None
    """Where, as SkyPilot writes it: aws, gcp/us-central1, k8s; none: where it is cheapest."""
    cpus: str | None = None
    """CPU cores of a machine: 64, or 64+ for at least so many."""
    memory: str | None = None
    """Memory of a machine in GB: 400+."""
    disk_gb: int = 256
    """Disk of a machine in GB: the environment, and shards that data.cache keeps."""
    image: str | None = None
    """Image, such as docker:ghcr.io/you/pretrain:1.0, in which `setup` and the run take place."""
    setup: tuple[str, ...] = ()
    """Lines of shell that install the package; none: from the checkout that this is started in."""
    environment: tuple[str, ...] = ()
    """Variables of the ranks: NAME=VALUE."""
    secrets: tuple[str, ...] = ()
    """Variables whose values are taken from here at submission and are not written down: WANDB_API_KEY."""
    python: str = "python3"
    """The interpreter on the machines."""

    def __post_init__(self) -> None:
        if self.gpu is not None and not _GPU.fullmatch(self.gpu):
            raise UserError(f"gpu {self.gpu!r}: write NAME:COUNT, as in H100:8")
        if self.gpu is not None:
            count = int(self.gpu.partition(":")[2] or 1)
            if self.gpus_per_node not in (SkyPilot.gpus_per_node, count):
                raise UserError(f"gpus_per_node {self.gpus_per_node}: gpu {self.gpu} says {count}; leave one out")
            object.__setattr__(self, "gpus_per_node", count)
        super().__post_init__()
        for broken, sentence in self._rules():
            if broken:
                raise UserError(sentence)

    def _rules(self) -> list[tuple[bool, str]]:
        unset = [item for item in self.environment if not re.match(r"[A-Za-z_]\w*=", item)]
        unnamed = [item for item in self.secrets if not _NAME.fullmatch(item)]
        return [
            (bool(unset), f"environment {unset}: write NAME=VALUE"),
            (bool(unnamed), f"secrets {unnamed}: names of variables; their values are taken from here at submission"),
            (self.disk_gb < 1, f"disk_gb {self.disk_gb} must be 1 or more"),
        ]


def render(options: SkyPilot, job: Job, config: str) -> str:
    """The task, as YAML.

    Args:
        config: resolved, as YAML.

    Raises:
        UserError: no GPU is named, a new machine would not find the checkpoints, or not get the package.
    """
    if options.gpu is None and options.gpus_per_node:
        raise UserError("gpu: which? As in --gpu H100:8; none with --gpus-per-node 0 --ranks-per-node N")
    to = str(yaml.safe_load(config)["checkpoint"]["to"] or "")
    if "://" not in to or to.startswith("file:"):
        raise UserError("bucket: a machine that is taken away takes its disk along; name --bucket s3://bucket/runs")
    install = [] if options.setup or options.image else [_install(options, job, to)]
    tree = {
        "name": name_of(job),
        "num_nodes": options.nodes,
        "resources": _resources(options),
        "workdir": str(job.work_folder) if install else None,
        "envs": dict(item.split("=", 1) for item in options.environment),
        "secrets": dict.fromkeys(options.secrets),
        "setup": "\n".join([*install, *options.setup, ""]).strip("\n"),
        "run": _run(options, config),
    }
    return yaml_text.dump_all([{key: value for key, value in tree.items() if value not in (None, {}, "")}])


def command(options: SkyPilot, job: Job, path: Path) -> list[str]:
    """What hands the task over."""
    secrets = [word for name in options.secrets for word in ("--secret", name)]
    return [TOOL, "jobs", "launch", "--yes", "--detach-run", *secrets, str(path)]


def name_of(job: Job) -> str:
    """The run's name as SkyPilot allows it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.name).strip("-._")
    if not name or not name[0].isalpha():
        raise UserError(f"name {job.name!r}: SkyPilot wants names that begin with a letter; use another --name")
    return name


def _resources(options: SkyPilot) -> dict[str, Any]:
    asked = {
        "infra": options.infra,
        "accelerators": options.gpu,
        "cpus": options.cpus,
        "memory": options.memory,
        "disk_size": options.disk_gb,
        "image_id": options.image,
        "use_spot": options.spot,
        "job_recovery": {"max_restarts_on_errors": options.max_restarts, "recover_on_exit_codes": [REQUEUE]},
    }
    return {key: value for key, value in asked.items() if value is not None}


def _install(options: SkyPilot, job: Job, to: str) -> str:
    if not (job.work_folder / "pyproject.toml").exists():
        raise UserError(
            f"setup: {job.work_folder} is no checkout to install from; start there, or say how with --setup LINE... "
            "or --image docker:IMAGE"
        )
    extra = _EXTRAS.get(to.partition("://")[0])
    return shell.line(
        [options.python, "-m", "pip", "install", "-c", "constraints.txt", f".[{extra}]" if extra else "."]
    )


def _run(options: SkyPilot, config: str) -> str:
    """The config travels inside, so that the file is all there is to keep; no line of a mapping in YAML can be the word
    that ends it. `exec`: signals reach the ranks."""
    ranks = [] if options.gpu and options.ranks_per_node is None else ["--ranks-per-node", str(options.ranks)]
    program = shell.line([options.python, "-m", "pretrain", "launch", "node", "../config.yaml", *ranks])
    lines = ["mkdir -p ~/pretrain/work && cd ~/pretrain/work", f"cat > ../config.yaml <<'{_END}'", config.rstrip("\n")]
    return "\n".join([*lines, _END, f"exec {program}", ""])
