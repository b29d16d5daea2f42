"""What lies in a run's checkpoints, whether it is whole, and its weights as plain files for others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pretrain import checkpoint
from pretrain import checkpoint_files as files
from pretrain.checkpoints import places, state
from pretrain.checkpoints.tensors import Stored
from pretrain.checkpoints.url import Folder, folder_of
from pretrain.errors import UserError


def inspect(source: str) -> dict[str, Any]:
    """A checkpoint with its tensors, or a line for each checkpoint of a run; as JSON. Hashes are not compared.

    Raises:
        UserError: it is neither.
    """
    folders, one = _folders(source)
    if not one:
        return {"run": source, "checkpoints": {folder.name: _summary(folder) for folder in folders}}
    found = _summary(folders[0])
    if found["condition"] == "complete":
        found |= {"parts": _parts(folders[0]), "tensors": _tensors(folders[0])}
    return {"checkpoint": str(folders[0])} | found


def verify(source: str) -> dict[str, list[str]]:
    """For a checkpoint, or each one of a run, everything that is wrong with it as 'file: reason'; every file is hashed,
    and has the form that its name tells.

    Raises:
        UserError: it is neither.
    """
    found = {folder: list(files.faults(folder)) for folder in _folders(source)[0]}
    return {str(folder): reasons or list(_misshapen(folder)) for folder, reasons in found.items()}


def consolidate(source: str, out: Path) -> dict[str, Any]:
    """Write the weights as OUT/model.safetensors, and their average as OUT/ema.safetensors, each tensor whole.

    The folder appears whole or not at all.

    Args:
        source: checkpoint, or run for its newest good one.

    Raises:
        UserError: the source is no whole checkpoint, or `out` exists or cannot be made.
    """
    folder = checkpoint.locate(source)
    if out.exists():
        raise UserError(f"out {out} exists: name another folder, or remove it")
    temp = out.with_name(f".{out.name}.{os.getpid()}")
    written: dict[str, Any] = {}
    try:
        temp.mkdir(parents=True)
        kinds = [("model.safetensors", False)] + [("ema.safetensors", True)] * checkpoint.has_average(folder)
        for name, average in kinds:
            weights: Mapping[str, Tensor] = checkpoint.read_weights(folder, average)
            written[name] = files.write_tensors(temp / name, weights)["size"]
        os.replace(temp, out)
    except OSError as error:
        raise UserError(f"out {out} cannot be written ({error}); name a folder on a disk with room") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return {"checkpoint": str(folder), "folder": str(out), "bytes": written}


def lines(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `inspect` found, for a person: a line for each checkpoint or tensor."""
    if "checkpoints" in found:
        return {name: _line(facts) for name, facts in found["checkpoints"].items()} or {found["run"]: "no checkpoints"}
    told = {name: facts for name, facts in found.items() if name not in ("tensors", "parts")}
    told |= {name: f"{part['bytes']:,} bytes in {part['files']} files" for name, part in found.get("parts", {}).items()}
    return told | {name: f"{t['dtype']} {t['shape']}" for name, t in found.get("tensors", {}).items()}


def _folders(source: str) -> tuple[list[Folder], bool]:
    """The checkpoints that are meant, newest first, and whether one was named."""
    path = folder_of(source)
    if places.NAME.fullmatch(path.resolve().name) or (path / files.COMMIT).exists():
        if not files.names_in(path):
            raise UserError(f"{source} does not exist or is empty; name RUN or RUN/checkpoints/step_...")
        return [path], True
    return checkpoint.whole_checkpoints(checkpoint.homes_of(path)), False


def _summary(folder: Folder) -> dict[str, Any]:
    reason = files.fault(folder, contents=False) or next(_misshapen(folder), None)
    if reason is not None:
        return {"condition": f"damaged: {reason}"}
    trainer = checkpoint.read_trainer(folder)
    run = yaml.safe_load((folder / state.CONFIG).read_text()) or {}
    keys = ("step", "samples", "world_size", "attempt", "saved")
    facts = {"condition": "complete"} | {key: trainer[key] for key in keys}
    age = datetime.now(UTC) - datetime.fromisoformat(trainer["saved"])
    size = sum(entry["size"] for entry in files.manifest(folder).values())
    return facts | {"age_s": round(age.total_seconds()), "engine": run.get("engine"), "bytes": size}


def _misshapen(folder: Folder) -> Iterator[str]:
    """What of a checkpoint that its manifest vouches for is not of its form: a manifest can be forged."""
    try:
        checkpoint.read_trainer(folder)
        yaml.safe_load((folder / state.CONFIG).read_text())
        for stem in (*state.SPREAD.values(), *state.SAME.values()):
            Stored(checkpoint.files_of(folder, stem))
    except (OSError, UserError, UnicodeDecodeError) as error:
        yield str(error).removeprefix(f"{folder}/").removeprefix(f"{folder}: ")
    except yaml.YAMLError as error:
        yield f"{state.CONFIG}: is no YAML ({' '.join(str(error).split())})"


def _parts(folder: Folder) -> dict[str, Any]:
    entries = files.manifest(folder)
    stems = [*state.SPREAD.values(), *state.SAME.values(), "state/rng"]
    found = {stem: [e["size"] for name, e in entries.items() if name.startswith(stem)] for stem in stems}
    return {stem: {"bytes": sum(sizes), "files": len(sizes)} for stem, sizes in found.items() if sizes}


def _tensors(folder: Folder) -> dict[str, Any]:
    return dict(_described(folder))


def _described(folder: Folder) -> Iterator[tuple[str, Any]]:
    for stem in (*state.SPREAD.values(), *state.SAME.values()):
        stored = Stored(checkpoint.files_of(folder, stem))
        for name in stored:
            dtype = str(stored.dtype(name)).removeprefix("torch.")
            yield f"{stem} {name}", {"dtype": dtype, "shape": list(stored.shape(name))}


def _line(facts: Mapping[str, Any]) -> str:
    if facts["condition"] != "complete":
        return str(facts["condition"])
    size, age = facts["bytes"] / 1e6, facts["age_s"] / 60
    return (
        f"complete  {facts['samples']:,} samples  {size:,.1f} MB  {facts['world_size']} ranks of {facts['engine']}  "
        f"attempt {facts['attempt']}  {age:,.0f} min old"
    )
