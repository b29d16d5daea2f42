"""Programs of torch.export: image.pt2 and text.pt2, which torch runs, compiles or lowers without any model code."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pretrain.export import graph, vocabulary
from pretrain.export.base import Asked, Limit, Trained

CONSUMER, OPTIONS = "with_torch", frozenset({"patch_tokens", "embeddings"})
EXTRA, ROUNDS_CROPS = "transformers", True


def write(trained: Trained, folder: Path, asked: Asked) -> None:
    """Fill a folder with the programs, whose extra file constants.json has preprocessing and names, and the tokenizer.

    Raises:
        UserError: a tower lacks what is asked for, or its code cannot be traced.
    """
    for name, each in graph.graphs(trained.encoder, asked).items():
        constants = json.dumps(graph.constants(trained.encoder, name, each))
        torch.export.save(each.traced(), folder / f"{name}.pt2", extra_files={"constants.json": constants})
    if asked.text:
        vocabulary.write_json(trained.encoder, folder)
        graph.write_table(trained.encoder, folder, asked)


def limit(asked: Asked) -> Limit:
    return Limit(largest=1e-4)
