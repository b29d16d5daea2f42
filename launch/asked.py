"""A command line of `pretrain launch` taken apart: the launcher's options, the run's knobs, the cluster's file."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import pretrain
from pretrain.config import Run
from pretrain.errors import UserError

CLUSTERS = Path(pretrain.__file__).parent / "configs" / "clusters"
_HELP = ("-h", "--help")


@dataclass(frozen=True)
class Asked:
    """What a command line asks for."""

    config: str
    own: tuple[str, ...]
    """Flags of the launcher; those of a cluster's file come first."""
    knobs: tuple[str, ...]
    """Flags of the run."""
    dry_run: bool = False
    as_json: bool = False


def parse(args: list[str], schema: type) -> Asked:
    """Whose each flag is: a field of `schema`, --cluster, --dry-run or --json are the launcher's, the others the run's.

    Raises:
        UserError: there is no config, a flag belongs to neither, or the cluster's file cannot be read.
    """
    if set(_HELP) & set(args):
        return Asked("", ("--help",), ())
    if not args or args[0].startswith("-"):
        raise UserError("which config? It comes first, then options: CONFIG --nodes 2")
    words = [part for arg in args[1:] for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    groups: dict[str, list[str]] = {"own": [], "knobs": [], "cluster": [], "dry_run": [], "json": []}
    group = "knobs"
    for word in words:
        group = _group(word, {item.name for item in dataclasses.fields(schema)}) if word.startswith("--") else group
        groups[group].append(word)
    cluster = [word for word in groups["cluster"] if word != "--cluster"]
    if len(groups["cluster"]) != 2 * len(cluster) or len(cluster) > 1:
        raise UserError(f"cluster {' '.join(cluster)}: name one file of {CLUSTERS}, or the path of one")
    own = [*(flag for name in cluster for flag in of_cluster(name, schema)), *groups["own"]]
    return Asked(args[0], tuple(own), tuple(groups["knobs"]), bool(groups["dry_run"]), bool(groups["json"]))


def of_cluster(name: str, schema: type) -> list[str]:
    """The options in configs/clusters/NAME.yaml, or in the file of that path, as flags.

    Raises:
        UserError: there is no such file, or a key of it is no option.
    """
    path = CLUSTERS / f"{name}.yaml" if (CLUSTERS / f"{name}.yaml").exists() else Path(name)
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
        raise UserError(f"cluster {name}: no file to read ({error}); there are {known}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a cluster's file is a mapping of options, not a {type(tree).__name__}")
    known_options = {item.name for item in dataclasses.fields(schema)}
    for key in tree:
        if key not in known_options:
            raise UserError(f"{key} in {path} is no option of this launcher{_nearest(str(key), known_options)}")
    return [word for key, value in tree.items() for word in (f"--{key}", *_words(value))]


def _group(word: str, options: set[str]) -> str:
    name = word.removeprefix("--").replace("-", "_")
    if name in ("cluster", "dry_run", "json"):
        return name
    knobs = {item.name for item in dataclasses.fields(Run)}
    if name not in options and name.partition(".")[0] not in knobs:
        raise UserError(f"{word} is no option of this launcher and no knob of a run{_nearest(name, options | knobs)}")
    return "own" if name in options else "knobs"


def _words(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), 1)
    return f"; did you mean --{close[0].replace('_', '-')}?" if close else ""
