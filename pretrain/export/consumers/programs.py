"""The image and text programs of a folder on the images and texts, in several batch sizes; NumPy in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import place
from pixels import preprocess
from safetensors.numpy import load_file, save_file

Run = Callable[[Mapping[str, np.ndarray]], "list[np.ndarray]"]
Load = Callable[[str], "tuple[Run, dict[str, Any]]"]


def main(folder: Path, work: Path, ending: str, load: Load) -> None:
    """Write down what the programs give.

    Args:
        ending: of the programs' files.
        load: a file's stem -> how to run it, and its constants.
    """
    found: dict[str, np.ndarray] = {}
    remarks: dict[str, str] = {}
    if (folder / f"image.{ending}").exists():
        run, constants = load("image")
        found["pixels"] = np.stack([preprocess(image, constants) for image in place.images(work)])
        found |= _outputs(run, {"pixels": found["pixels"]}, constants["outputs"])
    if (folder / f"text.{ending}").exists():
        run, constants = load("text")
        found["tokens"], remarks["tokenizer"] = _tokens(folder, work)
        inputs = {"tokens": found["tokens"]}
        if "embeddings" in constants["inputs"]:
            inputs["embeddings"] = load_file(folder / "token_embedding.safetensors")["weight"][found["tokens"]]
        found |= _outputs(run, inputs, constants["outputs"])
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, work / "there.safetensors")
    place.tell(work, **remarks)


def _outputs(run: Run, inputs: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """'name/3' -> [rows, ...] by batches of 3."""
    found: dict[str, np.ndarray] = {}
    for size, slices in place.batched(len(next(iter(inputs.values())))):
        batches = [run({name: rows[part] for name, rows in inputs.items()}) for part in slices]
        found |= {f"{name}/{size}": np.concatenate(each) for name, *each in zip(names, *batches, strict=True)}
    return found


def _tokens(folder: Path, work: Path) -> tuple[np.ndarray, str]:
    """By the tokenizer in the folder; where the model's tokenizer has no such form, those that were given."""
    if not (folder / "tokenizer.json").exists():
        return load_file(work / "here.safetensors")["tokens"], "none in this folder: the tokens were given"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode_batch(place.facts(work)["texts"])
    return np.array([each.ids for each in encoded], np.int64), "tokenizer.json"
