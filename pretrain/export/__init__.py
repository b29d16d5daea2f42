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
from pretrain.export import proof
from pretrain.export.base import Asked, Format, Report, Trained, refuse_unknown


def names() -> list[str]:
    """Every built-in format."""
    return named.names(sys.modules[__name__])


def find(name: str) -> Format:
    """The module of a format; UserError where there is none."""
    return cast("Format", named.module(sys.modules[__name__], name))


def export(
    source: str | Path, out: str | Path, to: str, asked: Asked | None = None, average: bool | None = None
) -> Report:
    """Write a run's encoders in another library's format.

    The folder appears whole or not at all: it is written aside, loaded by that library in a fresh process, compared
    with the encoders here on images and texts, and only then gets its name.

    Args:
        source: run folder (its newest good checkpoint) or checkpoint folder, of any engine.
        out: folder to make; it must not exist, or be empty.
        to: a name of `names()`, or a module with a dot in its name.
        asked: which towers, and in which form; default: both, in fp32.
        average: whether to take the averaged weights; None: where there are any.

    Raises:
        UserError: source, out or format cannot be used, or the format cannot hold what is asked for.
        RuntimeError: the other library does not give what the encoders here give; nothing is left behind.
    """
    method, out, asked = find(to), Path(out), asked or Asked()
    refuse_unknown(to, method.OPTIONS, asked)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out {out} exists and is not empty: name another folder, or remove it")
    folder = checkpoint.locate(source)
    trained = read(folder, checkpoint.has_average(folder) if average is None else average)
    temp = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temp.mkdir(parents=True)
        _write(method, to, trained, temp, asked)
        parity = proof.prove(trained.encoder, temp, method, asked)
        facts = {"format": to, "source": str(folder), "step": trained.step, "average": trained.average}
        (temp / "parity.json").write_text(json.dumps(facts | {"parity": parity}, indent=1) + "\n")
        os.replace(temp, out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Report(str(out), to, str(folder), trained.step, trained.average, size, parity)


def _write(method: Format, to: str, trained: Trained, folder: Path, asked: Asked) -> None:
    try:
        method.write(trained, folder, asked)
    except ModuleNotFoundError as error:
        fix = f"pip install 'pretrain[{method.EXTRA}]'" if method.EXTRA else f"install {error.name}"
        raise UserError(f"--to {to} needs {error.name}, which is not installed: {fix}") from error


def read(folder: checkpoint.Folder, average: bool) -> Trained:
    """What a checkpoint holds.

    Raises:
        UserError: it has no averaged weights, no config, or no model that can be built.
    """
    try:
        run, trainer = checkpoint.read_run(folder), checkpoint.read_trainer(folder)
    except OSError as error:
        raise UserError(f"{folder} has no readable config.yaml ({error}); use another checkpoint of the run") from error
    encoder = model.restore(folder, average, torch.device("cpu"))
    encoder.precision = "fp32"
    return Trained(encoder, run, checkpoint.step_of(folder), int(trainer["samples"]), average)
