"""Folders of checkpoints: how one is begun, entered under its name, found again and removed.

On a disk a checkpoint is written aside and renamed when it is whole. Names with a leading dot are unfinished work of a
killed process. A store has no rename: files lie under the final name, which holds the attempt, so that no two processes
write under one; COMMIT comes last, and what has none is no checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pretrain import checkpoint_files as files
from pretrain.checkpoints.url import Folder, Url

SAVING, ASIDE, REMOVING = ".saving_", ".aside_", ".removing_"
NAME = re.compile(rf"(?:{re.escape(ASIDE)})?step_(\d{{8,}})(?:\.(\d+))?")
_OF_ATTEMPT = re.compile(rf"{re.escape(SAVING)}(\d+)_step_\d+")


class Place(Protocol):
    """Where the checkpoints of a run lie. One rank calls all but `working`."""

    def working(self, step: int) -> Folder:
        """Where every rank writes its files."""
        ...

    def begin(self, step: int) -> None:
        """Make room for a checkpoint; leftovers of this attempt and earlier ones are swept."""
        ...

    def enter(self, step: int, may: Callable[[], None]) -> Folder:
        """Turn what was written, with its manifest, into a checkpoint, durably.

        Args:
            may: asked right before; raises where this process may not any more.
        """
        ...

    def abandon(self, step: int) -> None:
        """Remove what was written and not entered."""
        ...

    def sweep(self) -> None:
        """Finish or undo what killed processes left."""
        ...

    def listed(self) -> dict[int, Folder]:
        """Checkpoints by step, whatever their condition."""
        ...

    def remove(self, folder: Folder) -> None:
        """Remove a checkpoint; half a removal does not look like a damaged one. Raises: OSError."""
        ...


def of(parent: Folder, attempt: int = 0) -> Place:
    """The checkpoints in a folder, for one attempt at the run."""
    return Store(parent, attempt) if isinstance(parent, Url) else Disk(parent, attempt)


@dataclass(frozen=True)
class Disk:
    """See `Place`."""

    parent: Path
    attempt: int

    def working(self, step: int) -> Path:
        return self.parent / f"{SAVING}{self.attempt:05d}_step_{step:08d}"

    def begin(self, step: int) -> None:
        self.sweep()
        for part in ("weights", "state"):
            (self.working(step) / part).mkdir(parents=True)

    def enter(self, step: int, may: Callable[[], None]) -> Path:
        temp, folder = self.working(step), self.parent / f"step_{step:08d}"
        may()
        files.commit(temp)
        may()
        # An older one of that name is set aside first, where `listed` still finds it.
        aside = folder.with_name(ASIDE + folder.name)
        if folder.exists():
            os.rename(folder, aside)
        os.rename(temp, folder)
        files.sync_folder(self.parent)
        if aside.exists():
            shutil.rmtree(aside)
        return folder

    def abandon(self, step: int) -> None:
        shutil.rmtree(self.working(step), ignore_errors=True)

    def sweep(self) -> None:
        for name in files.names_in(self.parent):
            entry, original = self.parent / name, self.parent / name.removeprefix(ASIDE)
            if name.startswith(ASIDE) and not original.exists():
                os.rename(entry, original)  # set aside, and its successor never came
            elif name.startswith((ASIDE, REMOVING)) or (name.startswith(SAVING) and not self._is_later(name)):
                shutil.rmtree(entry)

    def listed(self) -> dict[int, Folder]:
        # Dot sorts before letters, so that a folder under its own name wins over one that was set aside.
        names = files.names_in(self.parent)
        return {int(match[1]): self.parent / name for name in names if (match := NAME.fullmatch(name)) and not match[2]}

    def remove(self, folder: Folder) -> None:
        assert isinstance(folder, Path)
        doomed = folder.with_name(REMOVING + folder.name.removeprefix(ASIDE))
        os.rename(folder, doomed)
        shutil.rmtree(doomed)

    def _is_later(self, name: str) -> bool:
        match = _OF_ATTEMPT.fullmatch(name)
        return match is not None and int(match[1]) > self.attempt


@dataclass(frozen=True)
class Store:
    """See `Place`."""

    parent: Url
    attempt: int

    def working(self, step: int) -> Url:
        return self.parent / f"step_{step:08d}.{self.attempt}"

    def begin(self, step: int) -> None:
        self.sweep()
        if files.names_in(self.working(step)):  # saved once already by this very attempt
            self.remove(self.working(step))

    def enter(self, step: int, may: Callable[[], None]) -> Url:
        folder = self.working(step)
        may()
        files.commit(folder)
        may()  # held up before COMMIT was there, it is withdrawn: no rename fails here for a late process
        for other, number, attempt in self._found():
            if number == step and attempt < self.attempt:
                self.remove(other)
        return folder

    def abandon(self, step: int) -> None:
        if files.names_in(self.working(step)):
            self.remove(self.working(step))

    def sweep(self) -> None:
        for folder, _, attempt in self._found():
            if attempt <= self.attempt and not (folder / files.COMMIT).exists():
                self.remove(folder)

    def listed(self) -> dict[int, Folder]:
        return {step: folder for folder, step, _ in self._found() if (folder / files.COMMIT).exists()}

    def remove(self, folder: Folder) -> None:
        assert isinstance(folder, Url)
        if (folder / files.COMMIT).exists():
            (folder / files.COMMIT).remove()
        folder.remove()

    def _found(self) -> list[tuple[Url, int, int]]:
        """(folder, step, attempt), in the order of attempts."""
        named = [(name, NAME.fullmatch(name)) for name in files.names_in(self.parent)]
        found = [(self.parent / name, int(match[1]), int(match[2])) for name, match in named if match and match[2]]
        return sorted(found, key=lambda item: item[2])
