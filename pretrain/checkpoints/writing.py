"""What becomes of a staged state: files of all ranks, a manifest, COMMIT, and only then the removal of old ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pretrain import checkpoint_files as files
from pretrain.checkpoints import places, tensors
from pretrain.checkpoints.places import Place
from pretrain.checkpoints.staging import Staged
from pretrain.checkpoints.url import Folder
from pretrain.errors import UserError
from pretrain.phases import phase
from pretrain.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay."""

    last: int
    """Newest whole ones; damaged ones do not count."""
    milestone_steps: int | None = None
    """Multiples of this many steps stay for ever."""
    before: int | None = None
    """The newest whole one of an earlier step than this stays, too: where the run would go back to."""


@dataclass(frozen=True)
class Written:
    """A checkpoint that is entered."""

    folder: Folder
    bytes: int
    """Of all ranks."""
    seconds: float
    """From the first byte to the durable name."""


def write(staged: Staged, place: Place, world: World, may: Callable[[], None], keep: Keep | None = None) -> Written:
    """Write a checkpoint. All ranks call it; all of them return, or all of them raise. It may run in any thread.

    Args:
        world: one whose collectives nobody else uses meanwhile.
        may: raises where a later attempt has taken the run over.
        keep: what is left of the older ones; None: all.

    Raises:
        UserError: the disk is full or failing; earlier checkpoints are untouched.
        ProcessDied: from `may`; nothing is touched.
    """
    started, folder = time.monotonic(), place.working(staged.step)
    doing, begun = f"saving checkpoint {folder.parent / f'step_{staged.step:08d}'}", False
    try:
        with world.together(doing):
            if world.is_main:
                may()
                begun = True
                place.begin(staged.step)
        found: dict[str, Any] = {}
        with world.together(doing), _followed(may):
            found = _write_files(staged, folder)
        everyone = world.share(found)
        entries = {name: entry for part in everyone for name, entry in part.items()}
        with world.together(doing), _followed(may):
            if world.is_main:
                files.write_manifest(folder, entries)
                with phase("committing", str(folder)):
                    folder = place.enter(staged.step, may)
    except Exception:
        if begun:
            _abandon(place, staged.step)
        raise
    written = Written(folder, sum(entry["size"] for entry in entries.values()), time.monotonic() - started)
    with phase("pruning"), world.together("removing old checkpoints"):
        if world.is_main and keep is not None:
            prune(place, keep)
    return written


def prune(place: Place, keep: Keep) -> list[Folder]:
    """Remove old checkpoints; one rank calls it, after a save.

    Returns:
        What is gone; what the disk refuses to remove is reported and no reason to stop a run.
    """
    gone: list[Folder] = []
    try:
        found = place.listed()
    except (OSError, UserError) as error:
        log.warning("old checkpoints could not be looked for: %s", error)
        return gone
    whole = [step for step in sorted(found) if files.fault(found[step], contents=False) is None]
    kept = set(whole[-keep.last :])
    kept |= {step for step in found if keep.milestone_steps and step % keep.milestone_steps == 0}
    kept |= set([step for step in whole if keep.before is not None and step < keep.before][-1:])
    for step in sorted(step for step in found if whole and step < whole[-1] and step not in kept):
        try:
            place.remove(found[step])
            gone.append(found[step])
        except (OSError, UserError) as error:  # a store's refusal is a UserError
            log.warning("checkpoint %s could not be removed: %s", found[step], error)
    return gone


def _write_files(staged: Staged, folder: Folder) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, pieces in staged.tensors.items():
        with phase("writing", name):
            found[name] = tensors.write(folder / name, pieces)
    for name, text in staged.texts.items():
        with phase("writing", name):
            files.write_plain(folder / name, text)
            found[name] = files.digest_of(text)
    return found


@contextmanager
def _followed(may: Callable[[], None]) -> Iterator[None]:
    """What a later attempt has swept away is missing: then that attempt is the reason to tell, not the file."""
    try:
        yield
    except FileNotFoundError:
        may()
        raise


def _abandon(place: places.Place, step: int) -> None:
    try:
        place.abandon(step)
    except (OSError, UserError) as error:  # the failure that led here is the one to tell; the next save sweeps
        log.warning("what was written of the checkpoint of step %d stays for now: %s", step, error)
