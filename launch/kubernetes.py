"""Kubernetes: a TrainJob of Kubeflow's Trainer with its runtime, or a plain JobSet; the resolved config in a ConfigMap.

One pod a node runs `pretrain launch node`, which ends with the run's exit code. The Job turns that code into a reason,
the JobSet the reason into what follows: 85 and a lost or preempted pod restart all pods and are not counted, 2 ends the
job, anything else is counted against `max_restarts`.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from pretrain.errors import UserError
from pretrain.launch import kubernetes_objects as objects
from pretrain.launch import yaml_text
from pretrain.launch.job import Job, Machines

TOOL = "kubectl"
_QUANTITY, _LABEL = re.compile(r"\d+(\.\d+)?(m|[kMGTP]i?)?"), re.compile(r"[\w./-]+=[\w.-]*")
_MOUNT, _VARIABLE = re.compile(r"[a-z0-9][a-z0-9.-]*:/[^:]+"), re.compile(r"[A-Za-z_]\w*=.*")


@dataclass(frozen=True, kw_only=True)
class Kubernetes(Machines):
    """Options of `pretrain launch kubernetes`."""

    form: Literal["trainjob", "jobset"] = "trainjob"
    """A TrainJob and its TrainingRuntime (Kubeflow Trainer 2), or a JobSet (0.10 or newer), which needs no Kubeflow."""
    image: str | None = None
    """Image with the entry point of docker/Dockerfile."""
    bucket: str | None = None
    """URL that checkpoints go to, such as s3://bucket/runs: a restarted pod has an empty disk."""
    mounts: tuple[str, ...] = ()
    """Volume claims that every pod sees: CLAIM:/path."""
    secrets: tuple[str, ...] = ()
    """Secrets whose entries become variables of the ranks: keys of the bucket, WANDB_API_KEY."""
    environment: tuple[str, ...] = ()
    """Variables of the ranks: NAME=VALUE."""
    cpus: str | None = None
    """CPU cores of a pod."""
    memory: str | None = None
    """Memory of a pod, shared memory included."""
    gpu: str = "nvidia.com/gpu"
    """Name of the resource that a GPU is."""
    shm: str = "16Gi"
    """Size of /dev/shm, through which decoded images and NCCL's data go."""
    grace_s: int = 120
    """Seconds from the notice to a pod until it is killed: long enough for a step and a checkpoint."""
    namespace: str | None = None
    """Namespace; none: that of kubectl."""
    service_account: str | None = None
    """Account of the pods, which may carry the rights on a bucket."""
    node_selector: tuple[str, ...] = ()
    """Labels that nodes must have: KEY=VALUE."""
    labels: tuple[str, ...] = ()
    """Labels of the job: kueue.x-k8s.io/queue-name=vision."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for broken, sentence in self._rules():
            if broken:
                raise UserError(sentence)

    def _rules(self) -> list[tuple[bool, str]]:
        wrong = {
            "mounts": ("CLAIM:/path", _MOUNT),
            "environment": ("NAME=VALUE", _VARIABLE),
            "node_selector": ("KEY=VALUE", _LABEL),
            "labels": ("KEY=VALUE", _LABEL),
        }
        found = {name: [i for i in getattr(self, name) if not rule.fullmatch(i)] for name, (_, rule) in wrong.items()}
        sizes = {name: getattr(self, name) for name in ("shm", "memory", "cpus")}
        return [
            (self.grace_s < 1, f"grace_s {self.grace_s} must be 1 or more"),
            *((bool(items), f"{name} {items}: write {wrong[name][0]}") for name, items in found.items()),
            *(
                (size is not None and not _QUANTITY.fullmatch(size), f"{name} {size!r}: write a quantity, as in 16Gi")
                for name, size in sizes.items()
            ),
        ]


def render(options: Kubernetes, job: Job, config: str) -> str:
    """The objects, as YAML.

    Args:
        config: resolved, as YAML.

    Raises:
        UserError: there is no image, or a restarted pod would not find its checkpoints.
    """
    if options.image is None:
        raise UserError("image: which? As in --image ghcr.io/you/pretrain:1.0; docs/docker.md tells how one is built")
    _refuse_forgetting(options, yaml.safe_load(config))
    name = name_of(job)
    config_map = objects.of(options, "v1", "ConfigMap", name) | {"data": {"config.yaml": config}}
    made = objects.train_job(options, name) if options.form == "trainjob" else [objects.job_set(options, name)]
    return yaml_text.dump_all([config_map, *made])


def command(options: Kubernetes) -> list[str]:
    """The tool that takes the rendering as its input."""
    return [TOOL, "apply", *(["-n", options.namespace] if options.namespace else []), "-f", "-"]


def name_of(job: Job) -> str:
    """The run's name as Kubernetes allows it; short, because names of pods are made from it."""
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")[:40].strip("-")
    if not name or not name[0].isalpha():
        raise UserError(f"name {job.name!r}: Kubernetes wants names that begin with a letter; use another --name")
    return name


def _refuse_forgetting(options: Kubernetes, tree: dict[str, Any]) -> None:
    to, folder = str(tree["checkpoint"]["to"] or ""), posixpath.join(objects.WORK, tree["folder"])
    kept = [posixpath.normpath(mount.partition(":")[2]) for mount in options.mounts]
    paths = [posixpath.join(objects.WORK, to or folder)]
    if "://" in to or any(f"{posixpath.normpath(path)}/".startswith(f"{home}/") for path in paths for home in kept):
        return
    raise UserError(
        f"bucket: a restarted pod has an empty disk and would begin again (checkpoints go to {paths[0]}); "
        "name --bucket s3://..., or a volume claim that holds that folder: --mounts CLAIM:/path --folder /path"
    )
