"""Which folder is a run's, and the knobs that lie in it, as plain YAML: another version may have written them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UserError

SIGNS = ("events.jsonl", "attempts", "metrics.jsonl")
"""A run has left one of these."""


def is_run(path: Path) -> bool:
    """Whether a run has begun in this folder."""
    return any((path / name).exists() for name in SIGNS)


def check(path: Path) -> Path:
    """A run folder.

    Raises:
        UserError: it is none.
    """
    if is_run(path):
        return path
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; name the folder of a run that has started")
    inside = sorted(item.name for item in path.iterdir() if item.is_dir() and is_run(item))[:3]
    fix = f"name {path / inside[0]}, or {path}/* for all in it" if inside else "name the folder of a run that has begun"
    raise UserError(f"{path}: no run has begun in it; {fix}")


def config(path: Path) -> dict[str, Any]:
    """The run's knobs, by section; {} where they were not written yet.

    Raises:
        UserError: the file is no YAML mapping.
    """
    file = path / "config.yaml"
    try:
        tree = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as a config ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a config is a mapping of knobs, not a {type(tree).__name__}")
    return tree


def knob(tree: Mapping[str, Any], section: str, name: str) -> Any:
    """A knob's value; None where it is none, or not there."""
    found = tree.get(section)
    return found.get(name) if isinstance(found, dict) else None
