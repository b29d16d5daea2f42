"""What a run's folder tells of one of its steps: numbers, the weights' hash, and the samples left out by then."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import checkpoint
from pretrain import checkpoint_files as files
from pretrain.checkpoint import Folder
from pretrain.errors import UserError
from pretrain.guard import hashes

COMPARED = ("loss", "terms", "grad_norm", "logit_scale", "logit_bias", "steps_skipped", "batch_digest", "weights_hash")
"""Names of the numbers that a step done again must give again."""


@dataclass(frozen=True)
class Past:
    """Of a step."""

    numbers: dict[str, Any]
    """By names in COMPARED: those that are known."""
    guard: dict[str, Any]
    """`rewinds` and `left_out` of `record.Record`: how the run came to this step, which a checkpoint from before the
    run went back does not know."""


def of(run_folder: Path, homes: Sequence[Folder], step: int, names: Sequence[str]) -> Past:
    """Read the past of a step; one rank calls it.

    Args:
        names: parameters that are hashed; none: hashes are not compared.

    Raises:
        UserError: nothing is known of the step.
    """
    record: dict[str, Any] = next(
        (found for found in _lines(run_folder / "metrics.jsonl") if found["step"] == step), {}
    )
    numbers = {name: record[name] for name in COMPARED if record.get(name) is not None}
    saved = next((folder for folder in checkpoint.whole_checkpoints(homes) if checkpoint.step_of(folder) == step), None)
    if saved is not None and files.fault(saved) is not None:
        saved = None  # it says nothing of what was computed
    if saved is not None and names:
        weights = checkpoint.read_weights(saved, False)
        numbers |= {"weights_hash": hashes.of_whole({name: weights[name] for name in names})}
    if not numbers:
        raise UserError(f"--replay {step}: metrics.jsonl has no such step; name a multiple of log.every_steps")
    if saved is not None:
        return Past(numbers, checkpoint.read_facts(saved)["guard"])
    return Past(numbers, _way(run_folder, step, record["rewinds"]))


def _way(run_folder: Path, step: int, rewinds: int) -> dict[str, Any]:
    """What the run left out before a step, by which time it had gone back so often."""
    if not rewinds:
        return {"rewinds": 0, "left_out": []}
    events = [event for event in _lines(run_folder / "events.jsonl") if event["event"] == "rewound"]
    found = [event["all_left_out"] for event in events if event["rewinds"] == rewinds]
    if not found:
        raise UserError(
            f"--replay {step}: events.jsonl does not tell what the run left out when it went back; restore it"
        )
    return {"rewinds": rewinds, "left_out": found[-1]}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a file of JSON objects; a killed run may have left a torn one."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)
