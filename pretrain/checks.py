"""What a run's knobs cannot tell by themselves: whether they fit the world, and the run that they go on from."""

from __future__ import annotations

import dataclasses

from pretrain.config import Run
from pretrain.engines import deepspeed_config
from pretrain.errors import UserError


def check_world(run: Run, world_size: int) -> None:
    """What can only be checked when the number of ranks is known.

    Raises:
        UserError: global_batch does not divide over the ranks, or micro_batch over a rank's share, or a DeepSpeed
            file has other batch sizes.
    """
    batch, micro = run.train.global_batch, run.train.micro_batch
    if batch % world_size:
        below = batch // world_size * world_size
        near = ", ".join(str(n) for n in (below, below + world_size) if n)
        raise UserError(f"train.global_batch {batch} is not a multiple of {world_size} ranks; nearest: {near}")
    if micro is not None and (micro > batch // world_size or (batch // world_size) % micro):
        share = batch // world_size
        fits = ", ".join(str(n) for n in range(share, 0, -1) if share % n == 0 and n <= max(micro, 1))[:40] or str(
            share
        )
        raise UserError(
            f"train.micro_batch {micro} does not divide the {share} pairs of each of {world_size} ranks; try {fits}"
        )
    if run.engine == "deepspeed":
        deepspeed_config.check_batches(run.parallel, run.train, world_size)


def changes(old: Run, new: Run) -> list[str]:
    """Fields that differ and may not when a run goes on in its folder, as 'section.key: old -> new'."""
    found: list[str] = []
    for item in dataclasses.fields(Run):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(before) and not isinstance(before, type):
            found += [
                f"{item.name}.{sub.name}: {getattr(before, sub.name)} -> {getattr(after, sub.name)}"
                for sub in dataclasses.fields(before)
                if getattr(before, sub.name) != getattr(after, sub.name) and sub.metadata.get("resume") != "free"
            ]
        elif before != after and item.metadata.get("resume") != "free":
            found.append(f"{item.name}: {before} -> {after}")
    return found
