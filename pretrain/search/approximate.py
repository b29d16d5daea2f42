"""The rows with the highest scores by faiss: exact below FLAT rows, an inverted file above, which looks at a part."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from pretrain.errors import UserError
from pretrain.search.index import Index

FLAT = 100_000
"""Rows below which all are compared."""
PROBES = 64
"""Lists of an inverted file that a query looks into."""
_PER_LIST = 64
"""Rows for each list that its centre is found from."""


def search(index: Index, queries: Tensor, k: int, lists: int | None = None) -> tuple[Tensor, Tensor]:
    """Nearly the k best rows of each query. The first search of an index builds faiss's own, FOLDER/faiss-*.index.

    Args:
        queries: [Q, D] fp32.
        lists: of the inverted file, 0 for none; default: 4 times the root of the number of rows.

    Returns:
        [Q, k] fp32 scores, descending, and int64 rows, -1 where a query's lists hold fewer; on the CPU.

    Raises:
        UserError: faiss is not installed, or the file is damaged.
    """
    faiss = _library()
    if lists is None:
        lists = 0 if len(index) < FLAT else round(4 * math.sqrt(len(index)))
    path = index.folder / f"faiss-{index.tower}-{_digest(index, lists)}.index"
    built = _read(faiss, path) if path.exists() else _build(faiss, index, lists, path)
    if lists:
        built.nprobe = min(PROBES, lists)
    scores, rows = built.search(np.ascontiguousarray(queries.cpu().numpy()), min(k, len(index)))
    return torch.from_numpy(scores), torch.from_numpy(rows)


def _library() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError(
            "--backend faiss: pip install 'pretrain[search]' first, or leave the backend at exact"
        ) from None
    return faiss


def _digest(index: Index, lists: int) -> str:
    """Of what a faiss index is made from: another one is built when parts are added."""
    made_of = (index.meta["model"]["fingerprint"], lists, [(part.name, part.rows) for part in index.parts])
    return xxhash.xxh3_64_hexdigest(repr(made_of).encode())


def _read(faiss: Any, path: Path) -> Any:
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:100]}): remove it") from None


def _build(faiss: Any, index: Index, lists: int, path: Path) -> Any:
    """Made block by block; fp16 features are kept in 16 bits."""
    form = f"IVF{lists}," if lists else ""
    form += "SQfp16" if index.meta["dtype"] == "fp16" else "Flat"
    built = faiss.index_factory(index.width, form, faiss.METRIC_INNER_PRODUCT)
    if lists and index.meta["dtype"] == "fp16":
        built.by_residual = False  # what is left beside a centre would be rounded again
    if not built.is_trained:
        built.train(_sample(index, max(1, lists) * _PER_LIST))
    for _, block in index.blocks():
        built.add(block.numpy())
    for old in index.folder.glob(f"faiss-{index.tower}-*.index"):
        old.unlink(missing_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    faiss.write_index(built, str(aside))
    os.replace(aside, path)
    return built


def _sample(index: Index, rows: int) -> np.ndarray:
    """[about rows, D] fp32, evenly over all."""
    stride = max(1, len(index) // rows)
    return np.concatenate([block[-first % stride :: stride].numpy() for first, block in index.blocks()])
