"""A copy of a run's state on the host, so that training goes on while it is written. Buffers are used again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoints import state as names
from pretrain.checkpoints.pieces import Piece, Shares, whole
from pretrain.checkpoints.state import State
from pretrain.world import World


@dataclass(frozen=True)
class Staged:
    """What this rank has to write."""

    step: int
    tensors: Mapping[str, list[Piece]]
    """File name -> pieces, on the CPU."""
    texts: Mapping[str, str]
    """File name -> contents; rank 0 has them."""


class Stage:
    """Takes states, one at a time: taking the next one overwrites what the last one gave."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, state: State, world: World, config_text: str, attempt: int = 0) -> Staged:
        """This rank's part of a state, copied. Collective.

        Args:
            config_text: the resolved run.
            attempt: the start of the run that saves.
        """
        tensors = pieces_of(state, world)
        copied = {file: self._copied(file, pieces) for file, pieces in tensors.items()}
        self._wait(tensors)
        texts = _texts(state, world, config_text, attempt) if world.is_main else {}
        return Staged(state.step, copied, texts)

    def _copied(self, file: str, pieces: list[Piece]) -> list[Piece]:
        return [Piece(p.name, self._buffer(file, p), p.offset, p.shape) for p in pieces]

    def _buffer(self, file: str, piece: Piece) -> Tensor:
        source, key = piece.tensor, (file, piece.name)
        held = self._buffers.get(key)
        if held is None or held.shape != source.shape or held.dtype != source.dtype:
            # Copies to pinned memory need not wait for each other.
            held = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = held
        return held.copy_(source, non_blocking=True)

    @staticmethod
    def _wait(tensors: Mapping[str, list[Piece]]) -> None:
        if any(piece.tensor.is_cuda for pieces in tensors.values() for piece in pieces):
            torch.cuda.current_stream().synchronize()


@torch.no_grad()
def pieces_of(state: State, world: World) -> dict[str, list[Piece]]:
    """File name -> what this rank writes into it; the tensors themselves, not copies. Collective."""
    groups = {stem: getattr(state, field) or {} for field, stem in names.SPREAD.items()}
    # Some engines have whole tensors on rank 0 alone.
    counts = world.share([len(group) for group in groups.values()])
    shares, found = Shares(), dict[str, list[Piece]]()
    for index, (stem, group) in enumerate(groups.items()):
        holders = [rank for rank, held in enumerate(counts) if held[index]]
        if not holders and stem != names.SPREAD["average"]:
            holders = [0]  # an optimizer before its first step has no state, and a file that says so
        if world.rank in holders:
            file = names.file_of(stem, holders.index(world.rank), len(holders))
            found[file] = shares.of(group, world.rank, holders)
    if world.is_main:
        same = {f"{stem}.safetensors": getattr(state, field) for field, stem in names.SAME.items()}
        found |= {file: _wholes(tensors) for file, tensors in same.items() if tensors}
    return found | {names.rng_file(world.rank): _wholes(state.rng)}


def _wholes(tensors: Mapping[str, Tensor]) -> list[Piece]:
    return [whole(name, tensor) for name, tensor in tensors.items()]


def _texts(state: State, world: World, config_text: str, attempt: int) -> dict[str, str]:
    trainer: dict[str, Any] = {"format": names.FORMAT, "step": state.step, "samples": state.samples}
    trainer |= {"world_size": world.size, "attempt": attempt, "facts": state.facts}
    trainer["saved"] = datetime.now(UTC).isoformat(timespec="seconds")
    return {names.TRAINER: json.dumps(trainer, indent=1) + "\n", names.CONFIG: config_text}
