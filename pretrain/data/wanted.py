"""Further columns of a batch: what objectives need besides a row's image and caption, and how metadata becomes numbers.

A need is one of::

    captions:4              4 captions of each image, tokens [B, 4, L], and how many are different: caption_counts [B]
    image_views:2           2 further views of each image, augmented by data.view_augment, [B, 2, 3, H, W]
    text_views:2            2 further views of each caption, edited by data.text_edits, [B, 2, L]
    meta:label              an integer of each sample's metadata, [B] int64; without one, -1
    meta:score:float        a number, [B] fp32; without one, NaN
    meta:language:text      a text as an id, [B] int64: equal ids are equal texts (63 bits of xxh3); without one, -1
    meta:boxes:10x4:float   lists of a fixed shape, so that ranks agree: cut, or filled as above, [B, 10, 4]
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from pretrain.data.images.decode import BadSample
from pretrain.errors import UserError

Kind = Literal["int", "float", "text"]
KNOWN = "captions:COUNT, image_views:COUNT, text_views:COUNT, meta:FIELD[:SHAPE][:int|float|text]"
_COUNT = re.compile(r"(captions|image_views|text_views):([1-9]\d{0,3})")
_META = re.compile(r"meta:([^:]+)(?::([1-9]\d*(?:x[1-9]\d*)*))?(?::(int|float|text))?")
_LOOKED_AT = 16
"""Samples among which a field must occur once before a run begins."""


class Needy(Protocol):
    """An objective, as far as this module knows one."""

    @property
    def needs(self) -> frozenset[str]: ...


class Samples(Protocol):
    """A reader's Source, as far as this module knows one."""

    def __len__(self) -> int: ...

    def sample(self, number: int) -> Any: ...


@dataclass(frozen=True)
class Field:
    """A field of the metadata, as a column."""

    name: str
    kind: Kind = "int"
    shape: tuple[int, ...] = ()
    """Of one row."""

    @property
    def column(self) -> str:
        """Its name in `Batch.extra`."""
        return f"meta:{self.name}"

    def read(self, meta: Mapping[str, Any]) -> np.ndarray:
        """One row, `shape` int64 (int, text) or fp32 (float).

        Raises:
            BadSample: the field holds something else.
        """
        fill, dtype = (math.nan, np.float32) if self.kind == "float" else (-1, np.int64)
        row = np.full(self.shape, fill, dtype)
        self._place(row, meta.get(self.name))
        return row

    def problem(self, meta: Mapping[str, Any]) -> str | None:
        """Why `read` cannot, if so."""
        try:
            self.read(meta)
        except BadSample as bad:
            return str(bad)
        return None

    def _place(self, row: np.ndarray, value: Any) -> None:
        if value is None:
            return
        if not row.ndim:
            row[()] = self._number(value)
        elif not isinstance(value, list | tuple):
            raise BadSample(f"the field {self.name!r} holds {value!r:.40}: a list is needed")
        else:
            for at, item in enumerate(value[: len(row)]):
                self._place(row[at : at + 1].reshape(row.shape[1:]), item)

    def _number(self, value: Any) -> float | int:
        if self.kind == "text" and isinstance(value, str):
            return xxhash.xxh3_64_intdigest(value.encode("utf-8", "surrogatepass")) >> 1
        if self.kind == "float" and isinstance(value, int | float) and _fits_fp32(value):
            return float(value)
        if self.kind == "int" and isinstance(value, int | float) and value == value // 1 and -(2**63) <= value < 2**63:
            return int(value)
        wanted = {"int": "an integer of 64 bits", "float": "a number within fp32", "text": "a text"}[self.kind]
        raise BadSample(f"the field {self.name!r} holds {value!r:.40}: {wanted} is needed")


@dataclass(frozen=True)
class Wanted:
    """Everything that the objectives of a run need besides images and captions."""

    captions: int = 0
    image_views: int = 0
    text_views: int = 0
    fields: tuple[Field, ...] = ()
    """By name, each once."""

    @staticmethod
    def of(needs: Iterable[str], who: str = "objective") -> Wanted:
        """What needs say, in any order; of one that is said twice the larger.

        Args:
            who: whose they are, for messages.

        Raises:
            UserError: a need is not known, or a field is needed in two forms.
        """
        counts, fields = {"captions": 0, "image_views": 0, "text_views": 0}, list[Field]()
        for need in sorted(needs):
            if counted := _COUNT.fullmatch(need):
                counts[counted[1]] = max(counts[counted[1]], int(counted[2]))
            elif meta := _META.fullmatch(need):
                fields.append(_field(*meta.groups()))
            else:
                raise UserError(f"{who} needs {need!r}, which no data can give; there are {KNOWN}")
        return Wanted(**counts, fields=_once(fields))

    def __bool__(self) -> bool:
        return self != Wanted()


def of_objectives(objectives: Iterable[Needy]) -> Wanted:
    """What all objectives of a run need: each gets at least the captions and views that it asks for.

    Raises:
        UserError: one needs what is not known, or two need a field in different forms.
    """
    return merge(Wanted.of(one.needs, f"objective {type(one).__name__}") for one in objectives)


def merge(parts: Iterable[Wanted]) -> Wanted:
    """The larger of every count, and all fields. UserError: a field is needed in two forms."""
    parts = list(parts)
    counts = {
        name: max((getattr(part, name) for part in parts), default=0)
        for name in ("captions", "image_views", "text_views")
    }
    return Wanted(**counts, fields=_once([field for part in parts for field in part.fields]))


def columns(metas: Sequence[Mapping[str, Any]], fields: Iterable[Field]) -> dict[str, Tensor]:
    """The metadata of rows as columns, by the fields' names in `Batch.extra`.

    Args:
        metas: of B rows. Have `refuse_bad` look at each while it can still be replaced.

    Returns:
        [B, *shape] int64 or fp32 each.

    Raises:
        BadSample: as `Field.read`.
    """
    found = {}
    for field in fields:
        rows = [field.read(meta) for meta in metas]
        shape = (len(rows), *field.shape)
        dtype = np.float32 if field.kind == "float" else np.int64
        found[field.column] = torch.from_numpy(np.stack(rows) if rows else np.empty(shape, dtype))
    return found


def refuse_bad(meta: Mapping[str, Any], fields: Iterable[Field]) -> None:
    """Raises BadSample where a sample's metadata cannot be a row of these columns."""
    for field in fields:
        field.read(meta)


def refuse_missing(wanted: Wanted, source: Samples) -> None:
    """Before a run begins: whether the data set has the fields at all, and as what they are needed.

    Raises:
        UserError: none of its first samples has a field, or none of those that have it fits the need.
    """
    if not wanted.fields:
        return
    metas = list(_first_metas(source))
    known = dict.fromkeys(key for meta in metas for key, value in meta.items() if value is not None)
    missing = next((field for field in wanted.fields if field.name not in known), None)
    if missing is not None:
        raise UserError(
            f"an objective needs {missing.column}, and none of the first {min(_LOOKED_AT, len(source))} samples of "
            f"data.train has {missing.name!r} in its metadata; they have {', '.join(list(known)[:20]) or 'none'}"
        )
    for field in wanted.fields:
        own = [field.problem(meta) for meta in metas if meta.get(field.name) is not None]
        if all(own):
            form = KNOWN.rpartition(", ")[2]
            raise UserError(
                f"an objective needs {field.column} as {field.kind}, and {own[0]}; the need says it: {form}"
            )


def _first_metas(source: Samples) -> Iterator[Mapping[str, Any]]:
    for number in range(min(_LOOKED_AT, len(source))):
        with contextlib.suppress(BadSample):  # the loader counts it and names it
            yield source.sample(number).meta


def _field(name: str, shape: str | None, kind: str | None) -> Field:
    kinds: dict[str | None, Kind] = {None: "int", "int": "int", "float": "float", "text": "text"}
    return Field(name, kinds[kind], tuple(int(size) for size in shape.split("x")) if shape else ())


def _once(fields: Iterable[Field]) -> tuple[Field, ...]:
    found: dict[str, Field] = {}
    for field in fields:
        other = found.setdefault(field.name, field)
        if other != field:
            forms = " and ".join(f"{one.kind} {list(one.shape)}" for one in (other, field))
            raise UserError(f"{field.column} is needed as {forms}: let the objectives agree on one form")
    return tuple(found[name] for name in sorted(found))


def _fits_fp32(value: float) -> bool:
    """Whether fp32 can hold a number; NaN, as json may spell it, is a missing one."""
    return value != value or abs(value) <= float(np.finfo(np.float32).max)
