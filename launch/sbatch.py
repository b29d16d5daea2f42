"""How sbatch reads: its directives, and the variables that would outrank them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from pretrain.errors import UserError

_LEAVES = ("SLURM_CONF", "SLURM_CLUSTERS")
_VARIABLES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "mem": "MEM_PER_NODE", "requeue": "NO_REQUEUE"}
"""Directives whose variable is not called as they are."""


def quoted(value: object) -> str:
    """A value of a directive. sbatch knows both kinds of quotes and no backslash.

    Raises:
        UserError: it has a line break, and a directive is one line.
    """
    text = str(value)
    if re.search(r"[\r\n]", text):
        raise UserError(f"{text!r}: names of runs and folders must be one line, to be written into a batch script")
    if shlex.quote(text) == text:
        return text
    return "".join(f"'{part}'" if '"' in part else f'"{part}"' for part in re.findall(r'"+|[^"]+', text))


def environment(script: str, variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that a submission may see: what the script says counts, and a job is no part of the job around it.

    Args:
        script: the batch script's text; a variable such as SBATCH_ACCOUNT would outrank its directives.
        variables: those of this process; SLURM_* of an interactive job would be read by every srun of the new one.
    """
    said = re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)
    outranking = {f"SBATCH_{_VARIABLES.get(name, name.upper().replace('-', '_'))}" for name in said}
    inside = "SLURM_JOB_ID" in variables
    return {
        name: value
        for name, value in variables.items()
        if name not in outranking and not (inside and name.startswith("SLURM_") and name not in _LEAVES)
    }
