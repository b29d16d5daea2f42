"""Checks of what is installed: against what the project asks for, of packages against each other, of the GPU's driver.

Older pairs that are known to fail (numpy 2 with torch before 2.3, transformers 5 with an open_clip that calls its
removed `batch_encode_plus`) lie below the versions that the project asks for, and are told as such.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from pretrain.doctor import smi
from pretrain.doctor.base import Finding, Patient

SHOWN = ("torch", "triton", "open_clip_torch", "timm", "transformers", "deepspeed", "numpy")
HEADS = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "deepspeed", "bitsandbytes", "wandb")
"""Packages whose own demands on others are looked at."""
BREAKS = {("torch", "triton")}
"""Demands that nothing works around: torch.compile generates code for the triton of its release."""
DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest driver for each CUDA major version. Source: NVIDIA, CUDA Compatibility, table 1."""


class Bad(NamedTuple):
    """Versions of NCCL that are known to fail."""

    versions: str
    what: str


BAD_NCCL = (
    Bad(">=2.28.3,<2.28.9", "crashes with a segmentation fault (nvidia-resiliency-ext's notes)"),
    Bad("==2.29.2", "hangs (pytorch/pytorch #174338)"),
)


def packages(patient: Patient) -> Iterator[Finding]:
    """Python and every package that the installed project asks for; extras where they are installed."""
    project = metadata.metadata("pretrain")
    asked = [Requirement(f"python{project['Requires-Python']}")]
    asked += [wanted for line in metadata.requires("pretrain") or () if _applies(wanted := Requirement(line))]
    unfit = [finding for wanted in asked if (finding := _unfit(wanted))]
    yield from unfit
    told = {"python": platform.python_version()} | {name: found for name in SHOWN if (found := installed(name))}
    if not unfit:
        said = ", ".join(f"{name} {version}" for name, version in told.items())
        yield Finding("packages", said, needed="what pyproject.toml asks for")


def pairs(patient: Patient) -> Iterator[Finding]:
    """What installed packages ask of each other, and torchvision's compiled operators."""
    told = [
        Finding(
            f"{head} with {wanted.name}",
            f"{head} {installed(head)} with {wanted.name} {installed(wanted.name)}",
            "fail" if (head, wanted.name) in BREAKS else "warn",
            f"{wanted.name}{wanted.specifier}",
            f"pip install '{wanted.name}{wanted.specifier}'",
        )
        for head in HEADS
        for wanted in demands(head)
        if (found := installed(wanted.name)) and not wanted.specifier.contains(found, prereleases=True)
    ]
    yield from told
    if not told:
        yield Finding("pairs", "packages fit each other", needed="what each asks of the others")
    yield from _torchvision()


def cuda(patient: Patient) -> Iterator[Finding]:
    """CUDA of the installed torch against the driver, and NCCL."""
    built = torch.version.cuda
    if built is None or not torch.cuda.is_available():
        yield Finding("driver", "skipped: " + ("no GPU is visible" if built else "torch is built without CUDA"), "skip")
        return
    found = smi.driver()
    yield driver(built, found) if found else Finding("driver", f"CUDA {built}; nvidia-smi tells no driver", "warn")
    yield nccl(".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def driver(built: str, found: str) -> Finding:
    """Of torch's CUDA version and the driver's version."""
    oldest = DRIVERS.get(int(built.split(".")[0]), 0)
    fits = int(found.split(".")[0]) >= oldest
    mend = f"update the driver to {oldest} or later, or install a torch built for an older CUDA"
    return Finding("driver", f"{found} with CUDA {built}", "ok" if fits else "fail", f"{oldest} or later", mend, found)


def nccl(found: str) -> Finding:
    """Of the version that torch has loaded."""
    known = [bad.what for bad in BAD_NCCL if found in SpecifierSet(bad.versions)]
    said, needed = f"{found}{''.join(f' {what}' for what in known)}", "not known to fail, the same on all ranks"
    return Finding("nccl", said, "warn" if known else "ok", needed, "install another torch, or its nvidia-nccl", found)


def demands(package: str) -> list[Requirement]:
    """What an installed package asks of others, without extras; empty where it is not installed."""
    try:
        lines = metadata.requires(package) or ()
    except metadata.PackageNotFoundError:
        return []
    return [wanted for line in lines if (wanted := _read(line)) and _applies(wanted, extras=False)]


def installed(name: str) -> str | None:
    """Version of a package; None: it is not there."""
    try:
        return platform.python_version() if name == "python" else metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unfit(wanted: Requirement) -> Finding | None:
    found = installed(wanted.name)
    if found is not None and wanted.specifier.contains(found, prereleases=True):
        return None
    said, asked = found or "not installed", f"{wanted.name}{wanted.specifier}"
    optional = wanted.marker is not None and "extra" in str(wanted.marker)
    return Finding(wanted.name, said, "warn" if optional else "fail", asked, f"pip install '{asked}'")


def _applies(wanted: Requirement, extras: bool = True) -> bool:
    """Whether a demand is made here; one of an extra is where the package is there."""
    if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
        return True
    return extras and "extra" in str(wanted.marker) and not wanted.extras and installed(wanted.name) is not None


def _read(line: str) -> Requirement | None:
    try:
        return Requirement(line)
    except InvalidRequirement:  # another project's old spelling asks for nothing that we could compare
        return None


def _torchvision() -> Iterator[Finding]:
    from pretrain.compat import torchvision_is_whole

    if not torchvision_is_whole():
        said = f"torchvision {installed('torchvision')} has no operators for torch {torch.__version__}; none is used"
        yield Finding("torchvision", said, "warn", "of the same build as torch", "install both from one index")
