"""Code and config as they were when a job was submitted: edits afterwards do not reach it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pretrain.errors import UserError

SCRIPT, CONFIG, CODE, COMMIT = "job.sh", "config.yaml", "code", "commit.txt"


def next_folder(run_folder: Path) -> Path:
    """Where the next submission of a run is kept: RUN/launch/0001 and so on."""
    home = run_folder / "launch"
    numbers = [int(path.name) for path in home.iterdir() if path.name.isdigit()] if home.is_dir() else []
    return home / f"{max(numbers, default=0) + 1:04d}"


def freeze(folder: Path, config: str, package: Path) -> None:
    """Write the config and a copy of the package.

    Args:
        folder: of the submission; made here, so that two submissions at once do not share one.
        config: YAML with every knob.
        package: the folder `pretrain`; what its links point to is copied too.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(config)
        (folder / COMMIT).write_text(commit(package))
        shutil.copytree(package, folder / CODE / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    except (OSError, shutil.Error) as error:
        raise UserError(f"{folder}: code and config cannot be kept there ({error})") from None


def commit(package: Path) -> str:
    """The commit of a checkout and what differs from it, a line a file; a line that says so where it is no checkout."""
    if shutil.which("git") is None:
        return "git is not installed\n"
    ask = ["git", "-c", "safe.directory=*", "-C", str(package)]
    head = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout + changed.stdout if head.returncode == 0 else "not a checkout\n"
