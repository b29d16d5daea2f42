"""The trained encoders in other libraries' formats, proven equal in a fresh process. The file name is the format."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import cast

import torch

from pretrain import checkpoint, model, named
from pretrain.errors import UserError
from pretrain.export.base import Format, Report, Tower


def names() -> list[str]:
    """Every built-in format."""
    return named.names(sys.modules[__name__])


def find(name: str) -> Format:
    """The module of a format; UserError where there is none."""
    return cast("Format", named.module(sys.modules[__name__], name))


def export(source: str | Path, out: str | Path, to: str, tower: Tower = "both", average: bool | None = None) -> Report:
    """Write a run's encoders in another library's format.

    The folder appears whole or not at all: it is written aside, loaded by that library in a fresh process, compared
    with the encoders here on images and texts, and only then gets its name.

    Args:
        source: run folder (its newest good checkpoint) or checkpoint folder.
        out: folder to make; it must not exist, or be empty.
        to: a name of `names()`, or a module with a dot in its name.
        tower: which encoder.
        average: whether to take the averaged weights; None: where there are any.

    Raises:
        UserError: source, out or format cannot be used, or the format cannot hold that tower.
        RuntimeError: the other library does not give what the encoders here give; nothing is left behind.
    """
    method, out = find(to), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out {out} exists and is not empty: name another folder, or remove it")
    folder = checkpoint.locate(source)
    average = checkpoint.has_average(folder) if average is None else average
    encoder = model.restore(folder, average, torch.device("cpu"))
    encoder.precision = "fp32"
    temp = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temp.mkdir(parents=True)
        method.write(encoder, temp, tower)
        parity = method.check(encoder, temp)
        step = checkpoint.step_of(folder)
        facts = {"format": to, "source": str(folder), "step": step, "average": average, "parity": parity}
        (temp / "parity.json").write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(temp, out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Report(str(out), to, str(folder), step, average, size, parity)
