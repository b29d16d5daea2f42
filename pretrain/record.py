"""environment.json: what a run ran on and with, one record per start, without secrets. data.json: on which shards."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pretrain import __version__
from pretrain.checkpoint_files import write_atomic
from pretrain.config import Run
from pretrain.data.shards import fingerprint
from pretrain.data.shards.fingerprint import Fact
from pretrain.errors import UserError

log = logging.getLogger(__name__)

REDACTED = "(redacted)"
_PACKAGES = (
    *("torch", "triton", "torchvision", "open_clip_torch", "timm", "transformers", "deepspeed", "numpy", "pillow"),
    *("safetensors", "webdataset", "tyro", "wandb"),
)
_VARIABLES = (
    *("CUDA", "NCCL", "TORCH", "PYTORCH", "TRITON", "OMP_", "MKL_", "GLOO", "SLURM", "MASTER_", "RANK", "WORLD_SIZE"),
    *("LOCAL_", "GROUP_", "ROLE_", "NVIDIA", "CUBLAS", "CUDNN", "FI_", "UCX_", "OMPI_", "LD_LIBRARY_PATH", "PYTHON"),
    *("HF_", "WANDB", "SKYPILOT", "KUBERNETES", "HOSTNAME", "KMP_", "MALLOC_", "LD_PRELOAD", "DS_"),
)
_SECRET = re.compile(r"key|token|secret|passw|credential|auth(?!or)|cookie|signature|private", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(\w+://)[^/\s@]+@")
_DIFF_LIMIT, _GIT_S = 1_000_000, 20


def environment(run: Run) -> dict[str, Any]:
    """What this start of a run ran on and with; JSON.

    Values of variables and flags whose names speak of keys, tokens, secrets or passwords are left out, and so is such a
    variable's value wherever else it turns up (a command line, a diff).
    """
    hidden = secrets(os.environ)
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run.name,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "folder": os.getcwd(),
        "command": redact_command(sys.orig_argv),
        "flags": redact_command(sys.argv[1:]),
        "python": sys.version,
        "platform": platform.platform(),
        "versions": versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "git": git(Path(__file__).parent),
        "variables": redact_variables(os.environ),
        "deepspeed": deepspeed_file(run.parallel.deepspeed),
    }
    return {name: _without(value, hidden) for name, value in record.items()}


def append(run_folder: Path, record: Mapping[str, Any]) -> None:
    """Add one start's record to RUN/environment.json, a list; one rank calls it.

    Raises:
        UserError: the file is there and is no such list.
    """
    path = run_folder / "environment.json"
    try:
        records = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        records = None
    if not isinstance(records, list):
        raise UserError(f"{path} is not a JSON list of starts; move it away")
    write_atomic(path, json.dumps([*records, record], indent=1) + "\n")


def keep_data(run_folder: Path, facts: Sequence[Fact], fresh: bool) -> None:
    """Write RUN/data.json, the shards that a run began with; one rank calls it at every start.

    Args:
        fresh: the run begins here; one that goes on keeps the file it has.
    """
    path = run_folder / "data.json"
    if fresh or not path.exists():
        write_atomic(path, fingerprint.dump(facts))


def data_changes(run_folder: Path, facts: Sequence[Fact]) -> str:
    """What has happened to the shards since RUN/data.json was written; '' where that cannot be told."""
    path = run_folder / "data.json"
    try:
        before = fingerprint.parse(path.read_text())
    except (OSError, UserError) as error:
        log.warning("%s: cannot tell which shards have changed: %s", path, error)
        return ""
    return fingerprint.summary(fingerprint.differences(before, facts))


def redact_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that bear on a run, by name, secrets left out."""
    found = {name: value for name, value in sorted(variables.items()) if name.startswith(_VARIABLES)}
    return {name: REDACTED if _SECRET.search(name) else value for name, value in found.items()}


def redact_command(words: Sequence[str]) -> list[str]:
    """A command line without the values of flags (`--api-key X`, `--api-key=X`, `KEY=X`) named like secrets."""
    out: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        follows = bool(out) and out[-1].startswith("-") and "=" not in out[-1] and _SECRET.search(out[-1]) is not None
        if follows and not word.startswith("-"):
            out.append(REDACTED)
        else:
            out.append(f"{name}={REDACTED}" if equals and "/" not in name and _SECRET.search(name) else word)
    return out


def secrets(variables: Mapping[str, str]) -> list[str]:
    """Values of secret variables, long enough that finding one elsewhere is no coincidence; longest first."""
    values = {value for name, value in variables.items() if _SECRET.search(name) and len(value) >= 8}
    return sorted(values, key=len, reverse=True)


def deepspeed_file(path: str | None) -> Any:
    """What a user's DeepSpeed JSON says at this start, since config.yaml names it only; None: there is none."""
    return None if path is None else json.loads(Path(path).read_text())


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None: not installed."""
    found: dict[str, str | None] = {"pretrain": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda}


def cpu() -> dict[str, Any]:
    """The processor, its cores (all, and those this process may use) and the machine's memory."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = names[0] if names else platform.processor()
    return {"name": name, "cores": os.cpu_count(), "usable_cores": usable, "memory_bytes": memory}


def gpus() -> list[dict[str, Any]]:
    """Name, memory, compute capability and driver of each GPU this process sees."""
    if not torch.cuda.is_available():
        return []
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"}
        | {"driver": driver.split("\n")[0] if driver else None}
        for gpu in found
    ]


def git(folder: Path) -> dict[str, Any] | None:
    """Commit of the code in `folder` and the diff of its working tree (at most a megabyte); None: no git checkout."""
    # In a container the checkout often belongs to another user, which git refuses unless told that it is meant.
    ask = partial(_output, "git", "-c", "safe.directory=*", "-C", str(folder))
    commit, root = ask("rev-parse", "HEAD"), ask("rev-parse", "--show-toplevel")
    if commit is None or root is None:
        return None
    diff = ask("diff", "HEAD", "--no-ext-diff", "--no-textconv") or ""
    untracked = (ask("ls-files", "--others", "--exclude-standard", "--full-name") or "").splitlines()
    found = {"root": root.strip(), "commit": commit.strip(), "untracked": untracked[:1000]}
    return found | {"diff": diff[:_DIFF_LIMIT], "diff_cut": len(diff) > _DIFF_LIMIT}


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.decode(errors="replace")


def _without(value: Any, hidden: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in hidden:
            value = value.replace(secret, REDACTED)
        return _URL_LOGIN.sub(rf"\1{REDACTED}@", value)
    if isinstance(value, Mapping):
        return {key: _without(item, hidden) for key, item in value.items()}
    return [_without(item, hidden) for item in value] if isinstance(value, list) else value
