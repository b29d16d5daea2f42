"""`pretrain launch node|docker|kubernetes|skypilot`: where containers or rented machines run the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import yaml

from pretrain.launch import docker, handing, kubernetes, node, resolved, skypilot, snapshot
from pretrain.launch.asked import Asked
from pretrain.launch.job import Job, Machines
from pretrain.show import show


def on_node(want: Asked, options: node.Node) -> NoReturn:
    """Start the ranks of this node, pass signals on and end with the run's exit code; what pods and containers run."""
    raise SystemExit(node.main(options, want.config, want.knobs))


def in_docker(want: Asked, options: docker.Docker) -> None:
    """Start the ranks of this machine in a container; --dry-run prints the command."""
    config = resolved.resolve(want.config, want.knobs)
    resolved.refuse_uneven(config, options)
    job = _job(config, want)
    command = docker.command(options, job)
    if want.dry_run:
        handing.tell(docker.render(options, job), {"command": command}, want.as_json)
        return
    handing.become(command)


def on_kubernetes(want: Asked, options: kubernetes.Kubernetes) -> None:
    """Apply a TrainJob, or a plain JobSet, with the resolved config in a ConfigMap; --dry-run prints it."""
    config = _frozen(want, options, options.bucket, kubernetes.TOOL)
    job = _job(config, want)
    text = kubernetes.render(options, job, config)
    if want.dry_run:
        handing.tell(text, {"objects": list(yaml.safe_load_all(text))}, want.as_json)
        return
    said = handing.hand(kubernetes.command(options), text)
    show({"run": job.name, "file": str(_keep(job, text, "kubernetes.yaml")), "said": said.strip()}, want.as_json)


def on_skypilot(want: Asked, options: skypilot.SkyPilot) -> None:
    """Launch a managed job of SkyPilot with the resolved config inside; --dry-run prints its YAML."""
    config = _frozen(want, options, options.bucket, skypilot.TOOL)
    job = _job(config, want)
    text = skypilot.render(options, job, config)
    if want.dry_run:
        handing.tell(text, {"task": yaml.safe_load(text)}, want.as_json)
        return
    path = _keep(job, text, "skypilot.yaml")
    said = handing.hand(skypilot.command(options, job, path))
    show({"run": job.name, "file": str(path), "said": said.strip()}, want.as_json)


def _frozen(want: Asked, options: Machines, bucket: str | None, tool: str) -> str:
    """The run's config, resolved, with its checkpoints in the bucket, when it fits these machines; and the tool that
    it goes to is here, or is not needed."""
    if not want.dry_run:
        handing.refuse_missing(tool)
    to = () if bucket is None else ("--checkpoint.to", bucket)
    config = resolved.resolve(want.config, (*want.knobs, *to))
    resolved.refuse_uneven(config, options)
    return config


def _job(config: str, want: Asked) -> Job:
    folder = resolved.run_folder(config)
    path = Path(want.config)
    return Job(name=folder.name, run_folder=folder, work_folder=Path.cwd(), config=path, flags=want.knobs)


def _keep(job: Job, text: str, name: str) -> Path:
    """What was handed over stays in the run folder."""
    folder = snapshot.next_folder(job.run_folder)
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    return folder / name
