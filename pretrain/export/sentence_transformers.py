"""A sentence-transformers folder: `SentenceTransformer(OUT).encode(...)` takes images and texts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.export import transformers
from pretrain.export.base import Asked, Limit, Trained

CONSUMER, OPTIONS = "with_sentence_transformers", frozenset[str]()
EXTRA, ROUNDS_CROPS = "sentence-transformers", False


def write(trained: Trained, folder: Path, asked: Asked) -> None:
    """Fill a folder with transformers' files and the modules around them.

    Raises:
        UserError: transformers cannot hold the towers, or one alone is asked for.
    """
    if asked.tower != "both":
        raise UserError(f"--tower {asked.tower}: sentence-transformers takes CLIP's towers together; export both")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    # Towers without a causal mask see their padding, so every text needs as much of it as in training.
    padded: Any = {"text": {"padding": "max_length", "truncation": True}}
    with tempfile.TemporaryDirectory() as name:
        transformers.write(trained, Path(name), asked)
        modules = [Transformer(name, processing_kwargs=padded), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    said = folder / "sentence_bert_config.json"
    said.write_text(
        json.dumps(json.loads(said.read_text()) | {"processor_kwargs": {"backend": "pil"}}, indent=2) + "\n"
    )


def limit(asked: Asked) -> Limit:
    return Limit(largest=1e-4)
