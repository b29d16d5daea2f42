"""Checks of what is installed and of the devices."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import torch
from packaging.requirements import Requirement

from pretrain.config import Run
from pretrain.doctor.base import Finding


def versions(run: Run) -> Iterator[Finding]:
    """Python and every package that the installed project asks for, against what it asks for."""
    project = metadata.metadata("pretrain")
    asked = [Requirement(line) for line in metadata.requires("pretrain") or ()]
    yield _version(Requirement(f"python{project['Requires-Python']}"), platform.python_version())
    for wanted in asked:
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield _version(wanted, _installed(wanted.name))


def devices(run: Run) -> Iterator[Finding]:
    """GPUs, or the processor where there are none."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            size = f"{found.total_memory / 2**30:.0f} GiB"
            yield Finding(f"cuda:{number}", f"{found.name}, {size}, CUDA {torch.version.cuda}", "ok")
        return
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    yield Finding("devices", f"no GPU is visible ({built}); {os.cpu_count()} CPU cores", "warn")


def _version(wanted: Requirement, found: str | None) -> Finding:
    asked = f"{wanted.specifier} is asked for"
    if found is None:
        return Finding(wanted.name, f"is not installed, {asked}", "fail")
    fits = wanted.specifier.contains(found, prereleases=True)
    return Finding(wanted.name, found if fits else f"{found}, but {asked}", "ok" if fits else "fail")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
