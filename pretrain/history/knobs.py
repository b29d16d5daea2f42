"""Knobs and environments in which runs differ."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import Run
from pretrain.errors import UserError
from pretrain.history import lines

ABSENT = "(absent)"
_OF_PLACE = ("name", "folder")
"""Knobs that say which run it is, and nothing of it."""
_OF_START = ("MASTER_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "SLURM_", "HOSTNAME", "TORCH_FR_DUMP")
"""Variables that differ from start to start."""


def differing(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Knobs whose values differ: name, values, and which of them are the default; as JSON."""
    flat = [_flat(config) for config in configs]
    names = [name for name in dict.fromkeys(key for one in flat for key in one) if name not in _OF_PLACE]
    found = []
    for name in names:
        values = [one.get(name, ABSENT) for one in flat]
        if any(value != values[0] for value in values):
            default = _default(name)
            are = [value == default and value != ABSENT for value in values]
            found.append({"knob": name, "values": values, "is_default": are})
    return found


def environments(runs: Sequence[Path], starts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What differs between the machines and versions of runs' last starts: name and values; as JSON.

    Args:
        starts: facts of their last events of a start.
    """
    found = [_facts(run) | dict(facts) for run, facts in zip(runs, starts, strict=True)]
    names = dict.fromkeys(key for one in found for key in one)
    rows = [{"fact": name, "values": [one.get(name) for one in found]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def _facts(run: Path) -> dict[str, Any]:
    records = lines.document(run / "environment.json")
    last = records[-1] if isinstance(records, list) and records and isinstance(records[-1], dict) else {}
    git, cpu, gpus = last.get("git") or {}, last.get("cpu") or {}, last.get("gpus") or []
    diff = git.get("diff")
    data = lines.document(run / "data.json")
    facts = {name: last.get(name) for name in ("host", "python", "platform")}
    facts |= {f"version {name}": version for name, version in (last.get("versions") or {}).items()}
    facts |= {
        "commit": git.get("commit"),
        "changes to it": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else None,
    }
    facts |= {"cpu": cpu.get("name"), "usable cores": cpu.get("usable_cores")}
    facts |= {"gpus of the first rank": ", ".join(str(gpu.get("name")) for gpu in gpus) or None}
    facts |= {"data fingerprint": data.get("fingerprint") if isinstance(data, dict) else None}
    variables = (last.get("variables") or {}).items()
    return facts | {f"${name}": value for name, value in variables if not name.startswith(_OF_START)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if name == "objective" and not prefix:
            flat |= _objectives(value)
        elif isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _objectives(written: Any) -> dict[str, Any]:
    """The names as one knob, and the options of each."""
    listed = [item for item in (written if isinstance(written, list) else [written]) if isinstance(item, dict)]
    flat: dict[str, Any] = {"objective": ", ".join(str(item.get("name")) for item in listed)}
    for item in listed:
        flat |= _flat({k: v for k, v in item.items() if k != "name"}, f"objective.{item.get('name')}.")
    return flat


def _default(knob: str) -> Any:
    """A knob's default as YAML has it; ABSENT where it has none."""
    section, _, name = knob.rpartition(".")
    options: Any = Run
    if section.startswith("objective."):
        options = _options(section.removeprefix("objective."))
    elif section:
        options = next((f.default_factory for f in dataclasses.fields(Run) if f.name == section), None)
    if knob == "objective" or options is None:
        return ABSENT
    fields = {item.name: item.default for item in dataclasses.fields(options)}
    value = fields.get(name, ABSENT)
    return list(value) if isinstance(value, tuple) else value


def _options(objective: str) -> Any:
    """The options of an objective; this alone needs torch."""
    from pretrain import objectives

    try:
        return objectives.find(objective).Options
    except UserError:
        return None  # an own one that is not on this machine's path
