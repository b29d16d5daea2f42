"""Checkpoints that survive being killed anywhere: written aside, sealed, then renamed; verified before they are used.

A checkpoint is RUN/checkpoints/step_00001000 and holds

    weights/model.safetensors   weights/ema.safetensors (with an average)
    state/optimizer.safetensors state/objective.safetensors (if it has state) state/rng_00000.safetensors (each rank)
    state/trainer.json          config.yaml                 manifest.json     COMMIT

Names with a leading dot beside it are unfinished work of a killed process: swept at the next save.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import checkpoint_files as files
from pretrain import config
from pretrain.errors import UserError
from pretrain.world import World

log = logging.getLogger(__name__)

FORMAT = 1
_SAVING, _ASIDE, _REMOVING = ".saving_", ".aside_", ".removing_"
_NAME = re.compile(rf"(?:{re.escape(_ASIDE)})?step_(\d{{8,}})")
_MODEL, _AVERAGE = "weights/model.safetensors", "weights/ema.safetensors"
_OPTIMIZER, _OBJECTIVE, _TRAINER = "state/optimizer.safetensors", "state/objective.safetensors", "state/trainer.json"
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Pairs seen."""
    weights: dict[str, Tensor]
    """Parameters and buffers by their names in the unwrapped model."""
    average: dict[str, Tensor] | None
    """Moving average of the weights, if the run keeps one."""
    optimizer: dict[str, Tensor]
    """'MOMENT/PARAMETER'."""
    objective: dict[str, Tensor]
    """State of the objective; may be empty."""
    rng: dict[str, Tensor]
    """This rank's random streams; {} on a rank that did not exist when the state was saved."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else, as JSON: the data's fingerprint, the number of skipped samples..."""


def save(run_folder: Path, state: State, world: World, config_text: str) -> Path:
    """Write a checkpoint; all ranks call it, all of them return its folder or all of them raise.

    Args:
        run_folder: storage that every rank shares.
        state: rank 0's is written, and each rank's own `rng`.
        config_text: the resolved run, copied beside the weights.

    Raises:
        UserError: the disk is full or failing; earlier checkpoints are untouched.
    """
    folder = run_folder / "checkpoints" / f"step_{state.step:08d}"
    temp, doing = folder.with_name(_SAVING + folder.name), f"saving checkpoint {folder}"
    try:
        with world.together(doing):
            if world.is_main:
                _sweep(folder.parent)
                for part in ("weights", "state"):
                    (temp / part).mkdir(parents=True)
        found: dict[str, Any] = {}
        with world.together(doing):
            found = files.digests(temp, _write_parts(temp, state, world, config_text))
        everyone = world.share(found)
        with world.together(doing):
            if world.is_main:
                files.seal(temp, {name: entry for part in everyone for name, entry in part.items()})
                _publish(temp, folder)
    except Exception:
        if world.is_main:
            shutil.rmtree(temp, ignore_errors=True)
        raise
    return folder


def prune(run_folder: Path, keep_last: int, milestone_steps: int | None = None) -> list[Path]:
    """Remove old checkpoints; one rank calls it, after a save.

    Args:
        keep_last: newest whole checkpoints to keep; damaged ones do not count.
        milestone_steps: multiples of this many steps stay for ever.

    Returns:
        What is gone; what the disk refuses to remove is reported and no reason to stop a run.
    """
    found = _listed(run_folder)
    whole = [step for step in sorted(found) if files.fault(found[step], contents=False) is None]
    kept = set(whole[-keep_last:])
    kept |= {step for step in found if milestone_steps and step % milestone_steps == 0}
    old = [step for step in found if whole and step < whole[-1] and step not in kept]
    for step in sorted(old):
        # Half a removal must not look like a damaged checkpoint.
        doomed = found[step].with_name(f"{_REMOVING}step_{step:08d}")
        try:
            os.rename(found[step], doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            log.warning("checkpoint %s could not be removed: %s", found[step], error)
    return [found[step] for step in sorted(old) if not found[step].exists()]


def newest(run_folder: Path, world: World) -> Path | None:
    """The newest checkpoint that verifies, the same one on all ranks; None where none was ever finished.

    Damaged ones are reported and passed over.

    Raises:
        UserError: there are checkpoints and none is good; starting over silently would lose the run.
    """
    found: Path | None = None
    with world.together(f"looking for a checkpoint in {run_folder}"):
        if world.is_main:
            found = _newest(run_folder)
    shared: list[Path | None] = world.share(found)
    return shared[0]


def load(folder: Path, world: World) -> State:
    """Read a checkpoint that `newest` or `locate` returned; tensors are on the CPU. All ranks call it.

    Raises:
        UserError: a file cannot be read, or is of a later format.
    """
    with world.together(f"loading checkpoint {folder}"):
        trainer = json.loads((folder / _TRAINER).read_text())
        if trainer["format"] > FORMAT:
            raise UserError(f"{folder}: format {trainer['format']} is later than {FORMAT}; update pretrain")
        rng = folder / _rng(world.rank)
        return State(
            step=trainer["step"],
            samples=trainer["samples"],
            weights=files.read_tensors(folder / _MODEL),
            average=files.read_tensors(folder / _AVERAGE) if has_average(folder) else None,
            optimizer=files.read_tensors(folder / _OPTIMIZER),
            objective=files.read_tensors(folder / _OBJECTIVE) if (folder / _OBJECTIVE).exists() else {},
            rng=files.read_tensors(rng) if world.rank < trainer["world_size"] else {},
            facts=trainer["facts"],
        )


def locate(path: str | Path) -> Path:
    """The checkpoint that a run folder (its newest good one) or a checkpoint folder (itself) stands for.

    Raises:
        UserError: it is neither, is damaged, or holds no finished checkpoint.
    """
    path = Path(path)
    if _NAME.fullmatch(path.resolve().name) or (path / files.COMMIT).exists():
        if reason := files.fault(path):
            raise UserError(f"{path} is not a whole checkpoint ({reason}); use another one of the run")
        return path
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is neither a run folder nor a checkpoint; give RUN or RUN/checkpoints/step_...")
    found = _newest(path)
    if found is None:
        raise UserError(f"{path} holds no finished checkpoint yet; wait for its first save")
    return found


def read_facts(folder: Path) -> dict[str, Any]:
    """What the run noted besides tensors: `State.facts`."""
    facts: dict[str, Any] = json.loads((folder / _TRAINER).read_text())["facts"]
    return facts


def has_average(folder: Path) -> bool:
    """Whether a checkpoint holds averaged weights."""
    return (folder / _AVERAGE).exists()


def read_weights(folder: Path, average: bool) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint, on the CPU.

    Args:
        average: the moving average, completed by the weights that it does not follow (frozen ones).

    Raises:
        UserError: the run kept no average.
    """
    weights = files.read_tensors(folder / _MODEL)
    if not average:
        return weights
    if not has_average(folder):
        raise UserError(f"{folder} holds no averaged weights: optim.ema_decay was not set; ask for the plain ones")
    return weights | files.read_tensors(folder / _AVERAGE)


def read_run(folder: Path) -> config.Run:
    """The resolved run that wrote a checkpoint."""
    from pretrain import runfile

    return runfile.load(folder / _CONFIG, [])


def _write_parts(folder: Path, state: State, world: World, config_text: str) -> list[Path]:
    tensors = {_rng(world.rank): state.rng}
    if world.is_main:
        tensors |= {_MODEL: state.weights, _OPTIMIZER: state.optimizer}
        tensors |= {} if state.average is None else {_AVERAGE: state.average}
        tensors |= {_OBJECTIVE: state.objective} if state.objective else {}
    for name, values in tensors.items():
        files.write_tensors(folder / name, values)
    if not world.is_main:
        return [folder / name for name in tensors]
    trainer = {"format": FORMAT, "step": state.step, "samples": state.samples, "world_size": world.size}
    files.write_json(folder / _TRAINER, trainer | {"facts": state.facts})
    files.write_text(folder / _CONFIG, config_text)
    return [folder / name for name in (*tensors, _TRAINER, _CONFIG)]


def _publish(temp: Path, folder: Path) -> None:
    """Give a sealed folder its name. An older one of that name is set aside first, where `_listed` still finds it."""
    aside = folder.with_name(_ASIDE + folder.name)
    if folder.exists():
        os.rename(folder, aside)
    os.rename(temp, folder)
    files.sync_folder(folder.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _sweep(parent: Path) -> None:
    """Finish or undo what killed processes left; one set aside without a successor gets its name back."""
    for entry in sorted(parent.iterdir()) if parent.is_dir() else ():
        original = entry.with_name(entry.name.removeprefix(_ASIDE))
        if entry.name.startswith(_ASIDE) and not original.exists():
            os.rename(entry, original)
        elif entry.name.startswith((_SAVING, _ASIDE, _REMOVING)):
            shutil.rmtree(entry)


def _listed(run_folder: Path) -> dict[int, Path]:
    """Checkpoint folders by step, whatever their condition."""
    parent = run_folder / "checkpoints"
    # Dot sorts before letters, so that a folder under its own name wins over one that was set aside.
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    return {int(match[1]): parent / name for name in names if (match := _NAME.fullmatch(name))}


def _newest(run_folder: Path) -> Path | None:
    reasons = []
    for _, folder in sorted(_listed(run_folder).items(), reverse=True):
        reason = files.fault(folder)
        if reason is None:
            return folder
        reasons.append(f"{folder.name}: {reason}")
        log.warning("checkpoint %s is damaged (%s); trying the one before it", folder, reason)
    if reasons:
        raise UserError(f"{run_folder} has checkpoints but no good one ({'; '.join(reasons)}); use another name")
    return None


def _rng(rank: int) -> str:
    return f"state/rng_{rank:05d}.safetensors"
