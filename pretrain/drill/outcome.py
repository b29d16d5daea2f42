"""What a run ended with, in a form that two runs can be compared by: bits of tensors, and the history of losses."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import xxhash
from safetensors.torch import load_file

from pretrain import checkpoint


def fingerprint(run_folder: Path, steps: int) -> dict[str, str]:
    """xxh3 of every tensor of the checkpoint of the last step, by file and name: weights, averages, moments, streams.

    Raises:
        UserError: the run's newest whole checkpoint is an earlier one, or there is none.
    """
    folder = Path(str(checkpoint.locate(run_folder)))
    if folder.name != f"step_{steps:08d}":
        return {"the last checkpoint": folder.name}
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[f"{path.relative_to(folder)} {name}"] = (
                f"{tensor.dtype} {list(tensor.shape)} {xxhash.xxh3_128_hexdigest(raw)}"
            )
    return found


def history(run_folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of metrics.jsonl."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def difference(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """What differs, in a line; None: nothing."""
    names = sorted({*found, *expected})
    differing = [name for name in names if found.get(name) != expected.get(name)]
    return f"{len(differing)} of {len(names)} tensors differ, the first is {differing[0]}" if differing else None
