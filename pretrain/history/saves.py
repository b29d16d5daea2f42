"""The checkpoints of a run, as far as their names, COMMIT and manifests tell: no file of weights is opened."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoints.url import Folder, Url, folder_of, size_of
from pretrain.errors import UserError
from pretrain.history import folder as folders

NAME, COMMIT, MANIFEST = re.compile(r"step_(\d{8,})(?:\.(\d+))?"), "COMMIT", "manifest.json"
ANSWER_S = 15.0
"""How long a store may take to answer."""


@dataclass(frozen=True)
class Saves:
    """Checkpoints of a run."""

    steps: tuple[int, ...]
    """Those with COMMIT, oldest first."""
    newest: str | None
    """Its folder or URL."""
    bytes: int | None
    """Of the newest one's files, all ranks'."""
    problem: str | None
    """What is wrong with the newest one, or why a place could not be looked into."""


def read(run: Path, config: Mapping[str, Any], answer_s: float = ANSWER_S) -> Saves:
    """The checkpoints in a run folder, and where `checkpoint.to` sends them.

    Args:
        answer_s: a store that has not answered by then is told as the problem.
    """
    elsewhere = folders.knob(config, "checkpoint", "to")
    found = _look(run / "checkpoints")
    if elsewhere is None:
        return found
    remote = _within(answer_s, folder_of(str(elsewhere)) / str(config.get("name", run.name)) / "checkpoints")
    first = max((remote, found), key=lambda saves: saves.steps[-1:])
    steps = tuple(sorted({*remote.steps, *found.steps}))
    return Saves(steps, first.newest, first.bytes, first.problem or remote.problem)


def _within(seconds: float, parent: Folder) -> Saves:
    found: list[Saves | Exception] = []

    def look() -> None:
        try:
            found.append(_look(parent))
        except Exception as error:  # told or raised below, in the thread that asks
            found.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    answer = found[0] if found else TimeoutError(f"it has not answered for {seconds:g} s")
    if isinstance(answer, OSError | UserError):
        return Saves((), None, None, f"{parent} cannot be looked into: {' '.join(str(answer).split())[:300]}")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _look(parent: Folder) -> Saves:
    """What lies in one folder; a run may prune it at this moment."""
    if isinstance(parent, Path) and not parent.is_dir():
        return Saves((), None, None, None)
    named = [(match, item) for item in parent.iterdir() if (match := NAME.fullmatch(item.name))]
    found = sorted(((int(match[1]), int(match[2] or 0), item) for match, item in named), key=lambda entry: entry[:2])
    whole = [(step, item) for step, _, item in found if (item / COMMIT).exists()]
    if not whole:
        return Saves((), None, None, None)
    size, problem = _weigh(whole[-1][1])
    return Saves(tuple(step for step, _ in whole), str(whole[-1][1]), size, problem)


def _weigh(checkpoint: Folder) -> tuple[int | None, str | None]:
    """Bytes of a checkpoint, and which file has not the size that the manifest says."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_bytes())
        sizes = {str(name): int(entry["size"]) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return None, f"{checkpoint}: {MANIFEST} cannot be read ({' '.join(str(error).split())[:200]})"
    if not isinstance(checkpoint, Url):  # a request for each file of a store is too dear
        for name, size in sizes.items():
            with suppress(FileNotFoundError):
                if (there := size_of(checkpoint / name)) == size:
                    continue
                return None, f"{checkpoint}: {name} has {there} bytes instead of {size}"
            return None, f"{checkpoint}: {name} is missing"
    return sum(sizes.values()), None
