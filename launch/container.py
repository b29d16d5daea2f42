"""Containers on SLURM: pyxis is an option of the step, apptainer a program that the task runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pretrain.errors import UserError
from pretrain.launch.job import Job

if TYPE_CHECKING:
    from pretrain.launch.slurm import Slurm


def of_step(options: Slurm, job: Job) -> list[str]:
    """Options of srun."""
    if options.container is None or options.container_tool != "pyxis":
        return []
    mounts = ",".join(_mounts(options, job))
    return [
        f"--container-image={options.container}",
        f"--container-mounts={mounts}",
        f"--container-workdir={job.work_folder}",
    ]


def of_task(options: Slurm, job: Job) -> list[str]:
    """Words before the program."""
    if options.container is None or options.container_tool != "apptainer":
        return []
    gpus = ["--nv"] if options.gpus_per_node else []
    mounts = ",".join(_mounts(options, job))
    return ["apptainer", "exec", *gpus, "--bind", mounts, "--pwd", str(job.work_folder), options.container]


def _mounts(options: Slurm, job: Job) -> list[str]:
    """The folder of the job and that of its runs, where the frozen code lies, at the paths that they have outside.

    Raises:
        UserError: the name of one has a comma or a colon, which separate mounts.
    """
    for path in (job.work_folder, job.run_folder):
        if re.search("[,:]", str(path)):
            raise UserError(f"{path}: containers cannot mount a folder with a comma or a colon in its name")
    runs = [] if job.run_folder.is_relative_to(job.work_folder) else [job.run_folder.parent]
    return [*(f"{path}:{path}" for path in [job.work_folder, *runs]), *options.mounts]
