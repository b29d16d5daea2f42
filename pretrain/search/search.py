"""`pretrain search`: what lies nearest to queries among features that are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain.errors import UserError
from pretrain.evaluate.base.sources import Opened, open_source
from pretrain.search import approximate, exact, identity, pictures
from pretrain.search.index import Entry, Index, open_index
from pretrain.search.query import Query, vectors

Backend = Literal["exact", "faiss"]


@dataclass(frozen=True)
class Hit:
    """An answer."""

    score: float
    """Sum of cosines to the included sets less those to the excluded ones."""
    key: str
    """`shard/key`."""
    texts: list[str]
    """The image's captions, or the text that was found."""
    picture: str | None = None
    """Data URI."""
    why_none: str | None = None
    """Why there is no picture, where one was asked for."""


@dataclass(frozen=True)
class Answer:
    """What was found for a query."""

    query: str
    hits: list[Hit]
    picture: str | None = None
    """Data URI of the image that was asked with."""


@dataclass(frozen=True)
class Found:
    """What a search gives."""

    folder: str
    model: str
    tower: str
    """Whose features were searched."""
    rows: int
    missing_shards: int
    """How many are not embedded yet, and so not found."""
    backend: str
    answers: list[Answer]

    def as_json(self, pictures: bool = True) -> dict[str, Any]:
        """As plain lists and dictionaries."""
        found = dataclasses.asdict(self)
        for told in (
            () if pictures else [*found["answers"], *(hit for each in found["answers"] for hit in each["hits"])]
        ):
            del told["picture"]
            told.pop("why_none", None)
        return found


def search(
    folder: Path,
    asked: Sequence[Query],
    k: int = 10,
    *,
    tower: str | None = None,
    backend: Backend = "exact",
    source: str | None = None,
    with_pictures: bool = False,
) -> Found:
    """Answer queries.

    Args:
        folder: what `embed` wrote, finished or not.
        k: answers to a query, at most.
        tower: whose features to search; default: the image tower's where there are any.
        source: the model, where it lies elsewhere than when it embedded.
        with_pictures: read the answers' samples, and the queries' images, again for small pictures.

    Raises:
        UserError: there are no such features, the model is gone or another one, or a query cannot be read.
    """
    if k < 1:
        raise UserError(f"-k {k} must be at least 1")
    index = open_index(folder, tower)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = _model(index, source, device)
    with torch.inference_mode():
        directions = vectors(asked, opened)
        nearest = approximate.search if backend == "faiss" else exact.search
        scores, rows = nearest(index, directions, k)
    found = [[(score, index.entry(row)) for score, row in zip(*each, strict=True) if row >= 0]
             for each in zip(scores.tolist(), rows.tolist(), strict=True)]  # fmt: skip
    answers = _answers(index, asked, found, with_pictures)
    return Found(str(folder), opened.facts["checkpoint"], index.tower, len(index), index.missing, backend, answers)


def _model(index: Index, source: str | None, device: torch.device) -> Opened:
    """The model that embedded; UserError where it is gone, or is no longer what it was."""
    known = index.meta["model"]
    name = source or known["checkpoint"]
    try:
        opened = open_source(name, known["average"], device)
    except UserError as error:
        hint = "" if source else " (where the model has moved to, --model says)"
        raise UserError(f"{index.folder} was embedded by {name}: {error}{hint}") from None
    if identity.of_model(opened) != known["fingerprint"]:
        raise UserError(f"{name} is not the model that embedded {index.folder}: name that one with --model")
    return opened


def _answers(
    index: Index, asked: Sequence[Query], found: Sequence[Sequence[tuple[float, Entry]]], with_pictures: bool
) -> list[Answer]:
    entries = [entry for each in found for _, entry in each]
    drawn = iter(pictures.thumbnails(index.meta, entries) if with_pictures else [None] * len(entries))
    answers = []
    for query, each in zip(asked, found, strict=True):
        own = pictures.of_file(query.image) if with_pictures and query.image is not None else None
        answers.append(Answer(query.name, [_hit(score, entry, next(drawn)) for score, entry in each], own))
    return answers


def _hit(score: float, entry: Entry, picture: str | UserError | None) -> Hit:
    if isinstance(picture, UserError):
        return Hit(score, entry.key, entry.texts, None, str(picture))
    return Hit(score, entry.key, entry.texts, picture)
