"""`pretrain launch`: from a config and a cluster to a script or a command, without torch in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import flags, verbs_cloud
from pretrain.errors import UserError
from pretrain.launch import (
    asked,
    deepspeed,
    docker,
    kubernetes,
    node,
    resolved,
    skypilot,
    slurm,
    snapshot,
    torchrun,
)
from pretrain.launch.asked import Asked
from pretrain.launch.handing import become, lead, tell
from pretrain.launch.job import Job, Machines
from pretrain.show import show


def launch(args: list[str]) -> None:
    """`pretrain launch LAUNCHER CONFIG [--nodes N ...] [--section.key value] [--dry-run] [--json]`."""
    kind, rest = (args or ["nothing"])[0], args[1:]
    if kind in ("-h", "--help"):
        print("\n".join(f"pretrain launch {name:10} {call.__doc__}" for name, (_, call) in KINDS.items()))
        return
    if kind not in KINDS:
        raise UserError(f"launch {kind}: name a launcher, one of {', '.join(KINDS)}")
    KINDS[kind][1](*read(kind, rest))


def read(kind: str, rest: list[str]) -> tuple[Asked, Any]:
    """What a command line asks for, and the options of its launcher.

    Raises:
        UserError: a flag is neither an option nor a knob, or an option does not fit.
    """
    schema = KINDS[kind][0]
    want = asked.parse(rest, schema)
    return want, flags.parse(schema, want.own, f"pretrain launch {kind} CONFIG", schema())


def _slurm(want: Asked, options: slurm.Slurm) -> None:
    """Submit one batch script, with code and config frozen beside it; --dry-run prints the script."""
    config = _check(want, options)
    folder = snapshot.next_folder(resolved.run_folder(config))
    job = _job(config, folder / snapshot.CONFIG, (), folder / snapshot.CODE)
    script = slurm.render(options, job, folder)
    if want.dry_run:
        tell(script, {"script": script}, want.as_json)
        return
    snapshot.freeze(folder, config, resolved.PACKAGE)
    path = folder / snapshot.SCRIPT
    path.write_text(script)
    number = slurm.submit(path)
    where = {"run": str(job.run_folder), "script": str(path), "log": slurm.log_of(options, folder, number)}
    show({"job": number, **where}, want.as_json)


def _torchrun(want: Asked, options: torchrun.Torchrun) -> None:
    """Start the ranks of this machine; for several machines, print the command that each runs."""
    job = _job(_check(want, options), Path(want.config), want.knobs)
    command = torchrun.command(options, job)
    if want.dry_run or options.nodes > 1:
        tell(torchrun.render(options, job), {"command": command}, want.as_json)
        return
    become(command)


def _deepspeed(want: Asked, options: deepspeed.DeepSpeed) -> None:
    """Start the ranks of this machine by DeepSpeed's launcher; for several, print the command that each runs."""
    job = _job(_check(want, options), Path(want.config), want.knobs)
    command, hosts = deepspeed.command(options, job), deepspeed.hostfile(options)
    if want.dry_run or options.nodes > 1:
        tell(deepspeed.render(options, job), {"hostfile": hosts, "command": command}, want.as_json)
        return
    path = deepspeed.hostfile_path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(hosts)
    if code := lead(command):
        raise SystemExit(code if code > 0 else 128 - code)


KINDS: dict[str, tuple[type[Any], Callable[[Asked, Any], None]]] = {
    "slurm": (slurm.Slurm, _slurm),
    "torchrun": (torchrun.Torchrun, _torchrun),
    "deepspeed": (deepspeed.DeepSpeed, _deepspeed),
    "docker": (docker.Docker, verbs_cloud.in_docker),
    "kubernetes": (kubernetes.Kubernetes, verbs_cloud.on_kubernetes),
    "skypilot": (skypilot.SkyPilot, verbs_cloud.on_skypilot),
    "node": (node.Node, verbs_cloud.on_node),
}


def _check(want: Asked, machines: Machines) -> str:
    """The run's config, resolved, when it fits these machines."""
    config = resolved.resolve(want.config, want.knobs)
    resolved.refuse_uneven(config, machines)
    return config


def _job(config: str, path: Path, knobs: tuple[str, ...], code: Path | None = None) -> Job:
    run_folder = resolved.run_folder(config)
    return Job(name=run_folder.name, run_folder=run_folder, work_folder=Path.cwd(), config=path, flags=knobs, code=code)
