"""A run's config, checked and written out by a process of its own: options of objectives lie beside code of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import pretrain
from pretrain.errors import USER_ERROR, UserError
from pretrain.launch.job import Machines

PACKAGE = Path(pretrain.__file__).parent
"""The package that runs now: in a checkout, launch/ lies beside it and is linked, in a wheel it lies inside."""
_OTHER_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS")


def resolve(config: str, knobs: tuple[str, ...]) -> str:
    """YAML with every knob of the run at its value.

    Raises:
        UserError: the config is wrong, in the words of `pretrain train`; or it cannot be checked on this machine.
    """
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    environment = {name: value for name, value in os.environ.items() if name not in _OTHER_RANKS}
    command = [sys.executable, "-m", "pretrain", "train", config, *knobs, "--print-config"]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    if done.returncode == USER_ERROR:
        raise UserError(last.removeprefix("pretrain train: "))
    raise UserError(f"{config} cannot be checked on this machine, `{' '.join(command[1:])}` fails: {last}")


def run_folder(text: str) -> Path:
    """Absolute: where the run of a resolved config lives."""
    tree = _tree(text)
    return Path(os.path.abspath(Path(tree["folder"]) / tree["name"]))


def refuse_uneven(text: str, machines: Machines) -> None:
    """What the ranks would refuse when the job has waited for its turn.

    Raises:
        UserError: the global batch does not divide over the ranks.
    """
    batch, size = int(_tree(text)["train"]["global_batch"]), machines.world_size
    if batch % size:
        ranks = f"{size} ranks ({machines.nodes} nodes x {machines.ranks})"
        near = ", ".join(str(n) for n in (batch // size * size, (batch // size + 1) * size) if n)
        raise UserError(f"train.global_batch {batch} is not a multiple of {ranks}; nearest: {near}")


def _tree(text: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(text)
    return tree
