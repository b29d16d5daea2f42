"""Check of what must be the same on all ranks: code, config, packages, NCCL's variables. Shards: data.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import xxhash

from pretrain import record, runfile
from pretrain.doctor.base import Finding, Patient

SPEAKING = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "CUBLAS_", "CUDNN_", "PYTORCH_", "TRITON_INTERPRET")
"""Variables that change how ranks talk or compute."""
OWN = ("TORCH_FR_DUMP_TEMP_FILE",)
"""Which every rank may set for itself."""


def same(patient: Patient) -> Iterator[Finding]:
    """A hash of each, for the ranks to compare."""
    yield _code(Path(__file__).parents[1])
    if patient.config is not None:
        mend = "start every rank with the same file and flags, on a file system that all nodes share"
        text = runfile.dump(patient.config)
        yield Finding("config", _hash(text), "ok", "the same on all ranks", mend, alike=_hash(text))
    installed = sorted({f"{each.name}=={each.version}" for each in metadata.distributions()})
    mend = "use one environment: a container, or a folder that all nodes share"
    said = f"{len(installed)} packages, {_hash(*installed)}"
    yield Finding("environment", said, "ok", "the same on all ranks", mend, alike=said)
    chosen = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(SPEAKING) and k not in OWN)
    mend = "set them where the job starts, not in a node's own profile"
    said = f"{len(chosen)} set for NCCL, CUDA and torch, {_hash(*chosen)}"
    yield Finding("variables", said, "ok", "the same on all ranks", mend, alike=said, unlike="warn")


def _code(folder: Path) -> Finding:
    """Of the package's files, whatever git thinks of them; git only names them."""
    files = sorted(path for pattern in ("*.py", "*.json", "*.yaml") for path in folder.rglob(pattern))
    found = _hash(*(f"{path.relative_to(folder)}\0{_hash(path.read_bytes())}" for path in files))
    git = record.git(folder)
    changed = ", with changes" if git and (git["diff"] or git["untracked"]) else ""
    said = f"{found}, commit {git['commit'][:12]}{changed}" if git else found
    mend = "run one copy: `pretrain launch` freezes it in the run folder"
    return Finding("code", said, "ok", "the same on all ranks", mend, alike=f"{found} {_hash(git and git['diff'])}")


def _hash(*parts: object) -> str:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()
