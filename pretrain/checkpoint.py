"""Checkpoints that survive being killed anywhere: written aside, sealed, then renamed; verified before they are used.

A checkpoint is RUN/checkpoints/step_00001000 and holds

    weights/model.safetensors    weights/ema.safetensors (with an average)    state/optimizer.safetensors
    state/objective.safetensors  state/guard.safetensors (if they have state) state/rng_00000.safetensors (each rank)
    state/trainer.json           config.yaml                                  manifest.json    COMMIT

Ranks that write together have a file each: weights/model-00001-of-00008.safetensors. docs/checkpoints.md tells more.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import checkpoint_files as files
from pretrain import config
from pretrain.checkpoints import places, state, writing
from pretrain.checkpoints.staging import Stage
from pretrain.checkpoints.state import State
from pretrain.checkpoints.tensors import Stored
from pretrain.checkpoints.url import Folder, Url, folder_of
from pretrain.checkpoints.writing import Keep
from pretrain.errors import UserError
from pretrain.world import World

__all__ = ["Folder", "State", "folder_of", "has_average", "home", "load", "locate", "newest", "prune", "read_facts",
           "read_run", "read_weights", "save", "step_of", "whole_checkpoints"]  # fmt: skip

log = logging.getLogger(__name__)


def home(run: config.Run) -> Folder:
    """The folder in which a run's `checkpoints/` lies: the run folder, or its namesake in `checkpoint.to`."""
    return run.path if run.checkpoint.to is None else folder_of(run.checkpoint.to) / run.name


def save(run_folder: Folder, state: State, world: World, config_text: str) -> Folder:
    """Write a checkpoint and wait for it; all ranks call it, all of them return its folder or all of them raise.

    A run in training saves by `checkpoints.saver.Saver`, which does the same in the background.

    Args:
        run_folder: storage that every rank shares.
        config_text: the resolved run, copied beside the weights.

    Raises:
        UserError: the disk is full or failing; earlier checkpoints are untouched.
    """
    place = places.of(run_folder / "checkpoints")
    written = writing.write(Stage().take(state, world, config_text), place, world, lambda: None)
    return world.share(written.folder)[0]  # type: ignore[no-any-return]


def prune(run_folder: Folder, keep_last: int, milestone_steps: int | None = None) -> list[Folder]:
    """Remove old checkpoints and name them; one rank calls it. See `writing.prune`."""
    return writing.prune(places.of(run_folder / "checkpoints"), Keep(keep_last, milestone_steps))


def newest(homes: Folder | Sequence[Folder], world: World, before: int | None = None) -> Folder | None:
    """The newest checkpoint that verifies, the same one on all ranks; None where none was ever finished.

    Damaged ones are reported and passed over. Ranks share the reading.

    Args:
        homes: folder, or folders, in which `checkpoints/` may be.
        before: a step; only checkpoints of earlier ones are looked at.

    Raises:
        UserError: there are checkpoints and none is good; starting over silently would lose the run.
    """
    several = [homes] if isinstance(homes, Path | Url) else list(homes)
    found: list[Folder] = []
    with world.together(f"looking for a checkpoint in {several[0]}"):
        found = _listed(several, before) if world.is_main else []
    return _first_good(world.share(found)[0], several, world)


def load(folder: Folder, world: World) -> State:
    """A checkpoint that `newest` or `locate` returned; its tensors are read when asked for. All ranks call it.

    Raises:
        UserError: a file cannot be read, or is of another format.
    """
    with world.together(f"loading checkpoint {folder}"):
        trainer = read_trainer(folder)
        same = {field: _stored(folder, stem) for field, stem in state.SAME.items()}
        return State(
            step=trainer["step"],
            samples=trainer["samples"],
            weights=_stored(folder, state.SPREAD["weights"]),
            average=_stored(folder, state.SPREAD["average"]) if has_average(folder) else None,
            optimizer=_stored(folder, state.SPREAD["optimizer"]),
            rng=_rng(folder, world.rank) if world.rank < trainer["world_size"] else {},
            facts=trainer["facts"],
            **same,
        )


def locate(path: str | Folder) -> Folder:
    """The checkpoint that a run folder (its newest good one) or a checkpoint folder (itself) stands for; URLs too.

    Raises:
        UserError: it is neither, is damaged, or holds no finished checkpoint.
    """
    found = _located(path if isinstance(path, Url) else folder_of(path))
    read_trainer(found)
    return found


def _located(path: Folder) -> Folder:
    if places.NAME.fullmatch(path.resolve().name) or (path / files.COMMIT).exists():
        if reason := files.fault(path):
            raise UserError(f"{path} is not a whole checkpoint ({reason}); use another one of the run")
        return path
    homes = homes_of(path)
    found = _first_good(_listed(homes), homes, None)
    if found is None:
        raise UserError(f"{path} holds no finished checkpoint yet; wait for its first save")
    return found


def homes_of(path: Folder) -> list[Folder]:
    """Where checkpoints of a run folder may lie: in it, and where its config sends them.

    Raises:
        UserError: it is no run folder.
    """
    homes = [path]
    if isinstance(path, Path) and (path / state.CONFIG).is_file():
        from pretrain import runfile

        run = runfile.load(path / state.CONFIG, [])
        homes = homes if run.checkpoint.to is None else [home(run), path]
    if len(homes) == 1 and "checkpoints" not in files.names_in(path):
        raise UserError(f"{path} is neither a run folder nor a checkpoint; give RUN or RUN/checkpoints/step_...")
    return homes


def whole_checkpoints(homes: Iterable[Folder]) -> list[Folder]:
    """Every checkpoint, whatever its condition, newest first."""
    return _listed(homes)


def step_of(folder: Folder) -> int:
    """The step that a checkpoint's name tells, or else its contents."""
    match = places.NAME.fullmatch(folder.resolve().name)
    return int(match[1]) if match else int(read_trainer(folder)["step"])


def read_facts(folder: Folder) -> dict[str, Any]:
    """What the run noted besides tensors: `State.facts`."""
    facts: dict[str, Any] = read_trainer(folder)["facts"]
    return facts


def has_average(folder: Folder) -> bool:
    """Whether a checkpoint holds averaged weights."""
    return bool(files_of(folder, state.SPREAD["average"]))


def read_weights(folder: Folder, average: bool) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint, whole, on the CPU.

    Args:
        average: the moving average, completed by the weights that it does not follow (frozen ones).

    Raises:
        UserError: the run kept no average, or a file is not what the manifest and its name say.
    """
    if average and not has_average(folder):
        raise UserError(f"{folder} holds no averaged weights: optim.ema_decay was not set; ask for the plain ones")
    stems = [state.SPREAD["weights"]] + [state.SPREAD["average"]] * average
    try:
        return {name: tensor for stem in stems for name, tensor in _stored(folder, stem).items()}
    except OSError as error:
        raise UserError(f"{error}; use another checkpoint") from error


def read_run(folder: Folder) -> config.Run:
    """The resolved run that wrote a checkpoint."""
    from pretrain import runfile

    with tempfile.TemporaryDirectory() as temp:
        path = Path(temp) / state.CONFIG
        path.write_text((folder / state.CONFIG).read_text())
        return runfile.load(path, [])


def read_trainer(folder: Folder) -> dict[str, Any]:
    """state/trainer.json: what `state.FACTS` names.

    Raises:
        UserError: it is of another format, or of none.
    """
    try:
        trainer: dict[str, Any] = json.loads((folder / state.TRAINER).read_text())
        wrong = [key for key, kind in state.FACTS.items() if key not in trainer or type(trainer[key]) is not kind]
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: {state.TRAINER} is no JSON object ({error}); use another checkpoint") from error
    if wrong:
        rule = "lacks" if wrong[0] not in trainer else f"has {str(trainer[wrong[0]])[:40]!r} for"
        raise UserError(f"{folder}: {state.TRAINER} {rule} {wrong[0]}; use another checkpoint")
    if trainer["format"] != state.FORMAT:
        rule = "is later than" if trainer["format"] > state.FORMAT else "is older than"
        fix = "update pretrain" if trainer["format"] > state.FORMAT else "use the version of pretrain that wrote it"
        raise UserError(f"{folder}: format {trainer['format']} {rule} {state.FORMAT}; {fix}")
    return trainer


def files_of(folder: Folder, stem: str) -> list[Folder]:
    """Those that the manifest vouches for, and no others."""
    return [folder / name for name in files.manifest(folder) if state.is_file_of(stem, name)]


def _rng(folder: Folder, rank: int) -> dict[str, Tensor]:
    name = state.rng_file(rank)
    if name not in files.manifest(folder):
        raise OSError(f"{files.MANIFEST}: does not list {name}")
    return files.read_tensors(folder / name)


def _stored(folder: Folder, stem: str) -> Stored:
    return Stored(files_of(folder, stem))


def _listed(homes: Iterable[Folder], before: int | None = None) -> list[Folder]:
    found = [item for home in homes for item in places.of(home / "checkpoints").listed().items()]
    return [folder for step, folder in sorted(found, key=lambda item: -item[0]) if before is None or step < before]


def _first_good(candidates: Sequence[Folder], homes: Sequence[Folder], world: World | None) -> Folder | None:
    reasons = []
    for folder in candidates:
        reason = _fault(folder, world)
        if reason is None:
            return folder
        reasons.append(f"{folder.name}: {reason}")
        if world is None or world.is_main:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", folder, reason)
    if reasons:
        raise UserError(f"{homes[0]} has checkpoints but no good one ({'; '.join(reasons)}); use another name")
    return None


def _fault(folder: Folder, world: World | None) -> str | None:
    if world is None:
        return files.fault(folder)
    reason: str | None = None
    with world.together(f"verifying checkpoint {folder}"):
        reason = files.fault(folder, share=slice(world.rank, None, world.size))
    return next(filter(None, world.share(reason)), None)
