"""What a checkpoint holds, and under which names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

FORMAT = 2
CONFIG, TRAINER = "config.yaml", "state/trainer.json"
FACTS = {"format": int, "step": int, "samples": int, "world_size": int, "attempt": int, "saved": str, "facts": dict}
"""What TRAINER holds at the least."""
SPREAD = {"weights": "weights/model", "average": "weights/ema", "optimizer": "state/optimizer"}
"""Field of a State -> beginning of the names of its files, which ranks write together."""
SAME = {"objective": "state/objective", "guard": "state/guard"}
"""The same, of what rank 0 writes for all; left out where it is empty."""
_OF_RANKS = re.compile(r"-\d{5}-of-(\d{5})")


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Pairs seen."""
    weights: Mapping[str, Tensor]
    """Parameters and buffers by their names in the unwrapped model: as `Engine.model_state` gives them; of a loaded
    checkpoint, read when they are asked for."""
    average: Mapping[str, Tensor] | None
    """Moving average of the weights, if the run keeps one; as `weights`."""
    optimizer: Mapping[str, Tensor]
    """'MOMENT/PARAMETER'; as `weights`."""
    objective: Mapping[str, Tensor]
    """State of the objective, the same on every rank; may be empty."""
    rng: dict[str, Tensor]
    """This rank's random streams; {} on a rank that did not exist when the state was saved."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else, as JSON: the data's fingerprint, the number of skipped samples..."""
    guard: Mapping[str, Tensor] = field(default_factory=dict)
    """What watches over the run remembers, the same on every rank; may be empty."""


def rng_file(rank: int) -> str:
    """Where a rank's random streams are."""
    return f"state/rng_{rank:05d}.safetensors"


def file_of(stem: str, writer: int, writers: int) -> str:
    """The file of one of several ranks that write together; a single one's has the plain name."""
    return f"{stem}.safetensors" if writers == 1 else f"{stem}-{writer + 1:05d}-of-{writers:05d}.safetensors"


def is_file_of(stem: str, name: str) -> bool:
    """Whether a file holds a part of what `stem` names."""
    return _OF_RANKS.sub("", name) == f"{stem}.safetensors"


def absent(names: Collection[str]) -> list[str]:
    """Files without which a checkpoint of just these files is none: parts that every one has, all writers' shares."""
    needed = [CONFIG, TRAINER]
    for part, stem in SPREAD.items():
        matches = [_OF_RANKS.search(name) for name in names if is_file_of(stem, name)]
        counts = {int(match[1]) if match else 1 for match in matches} or ({1} if part != "average" else set())
        needed += [file_of(stem, writer, count) for count in counts for writer in range(count)]
    return [name for name in needed if name not in names]
