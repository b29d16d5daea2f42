"""Position in the stream -> a finished row. Runs in workers; pure, so that no number of workers or ranks shows.

What is drawn for a position, in this order: from `sample_random` its caption, then its crop, flip and augmentation;
from a `view_random` of their own each further view of the image, each further view of the caption, and the list of
captions. So what an objective asks for beside the pair changes nothing of the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import Data
from pretrain.data.images.decode import BadSample
from pretrain.data.images.pixels import Pixels
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.order import SampleOrder, sample_random, view_random
from pretrain.data.shards.reader import RawSample, Source
from pretrain.data.slab import Column, Columns, Layout
from pretrain.data.stages import Stages
from pretrain.data.texts.captions import Texts
from pretrain.data.wanted import Wanted, columns
from pretrain.errors import UserError
from pretrain.values import Skip

Tokenize = Callable[[list[str]], Tensor]
MAX_ATTEMPTS = 16
"""Replacements tried for one position; so many bad ones in a row are no accident."""
IMAGE_VIEWS, TEXT_VIEWS, CAPTIONS = 0, 1 << 20, 1 << 21
"""First number of each kind of view, for `view_random`."""


class Part(NamedTuple):
    """What comes of some rows of a batch beside their columns."""

    keys: tuple[str, ...]
    skips: tuple[Skip, ...]
    truncated: int
    """Captions of these rows that did not fit the context length."""


class Row(NamedTuple):
    """The texts of a row; its pixels are where they belong."""

    key: str
    caption: str
    captions: list[str]
    text_views: list[str]


class TrainRows:
    """Rows of a training run, and the columns that they fill: images [3, H, W] uint8, texts [L], ids [], and what is
    wanted beside: image_views [K, 3, H, W] uint8, text_views [K, L], captions [C, L], caption_counts [], meta:FIELD."""

    def __init__(
        self, source: Source, order: SampleOrder, data: Data, spec: ImageSpec, tokenize: Tokenize, wanted: Wanted
    ) -> None:
        self.source, self.order, self.tokenize, self.wanted = source, order, tokenize, wanted
        self.pixels, self.texts = Pixels(spec, data), Texts(data)
        self.layout = _layout(spec, tokenize([""]).shape[1], wanted)

    def number(self, place: int) -> int:
        return self.order.number(place)

    def read(self, number: int) -> RawSample:
        return self.source.sample(number)

    def make(self, places: Sequence[int], out: Columns, take: Callable[[int, int], RawSample], stages: Stages) -> Part:
        """Rows for positions.

        Raises:
            UserError: MAX_ATTEMPTS samples in a row cannot be used, or a shard cannot be read.
        """
        skips: list[Skip] = []
        rows = [self._row(place, _of_row(out, n), take, skips, stages) for n, place in enumerate(places)]
        with stages.at("text"):
            truncated = self._tokens(rows, out)
        return Part(tuple(row.key for row in rows), tuple(skips), truncated)

    def _row(
        self, place: int, out: Columns, take: Callable[[int, int], RawSample], skips: list[Skip], stages: Stages
    ) -> Row:
        """The row at a position; an unusable sample is replaced, by the same one everywhere, and noted in `skips`."""
        number = self.order.number(place)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                with stages.at("read", place):
                    raw = take(place, number) if attempt == 1 else self.source.sample(number)
                row = self._use(raw, place, attempt - 1, out, stages)
                out["ids"].fill_(number)
                return row
            except BadSample as bad:
                shard, _, key = self.source.key(number).partition("/")
                skips.append(Skip(place, shard, key, str(bad)))
                number = self.order.replacement(place, attempt)
        last = skips[-1]
        reason = f"the last is {last.shard}/{last.key}: {last.reason}"
        raise UserError(f"data.train: {MAX_ATTEMPTS} samples in a row cannot be used, {reason}; repair the shards")

    def _use(self, raw: RawSample, place: int, attempt: int, out: Columns, stages: Stages) -> Row:
        rng = sample_random(self.order.seed, place, attempt)
        with stages.at("text", place):
            caption = self.texts.one(raw.texts, rng)
            captions, views = self._more_texts(raw, caption, place, attempt)
            for name, column in columns([raw.meta], self.wanted.fields).items():
                out[name].copy_(column[0])
        with stages.at("decode", place):
            self.pixels.train(raw.image_bytes, rng, out["images"])
            for view in range(self.wanted.image_views):
                draw = view_random(self.order.seed, place, attempt, IMAGE_VIEWS + view)
                self.pixels.view(raw.image_bytes, draw, out["image_views"][view])
        if captions:
            out["caption_counts"].fill_(self.texts.available(raw.texts, self.wanted.captions))
        return Row(raw.key, caption, captions, views)

    def _more_texts(self, raw: RawSample, caption: str, place: int, attempt: int) -> tuple[list[str], list[str]]:
        """All captions that are wanted, and the further views of the one."""
        captions: list[str] = []
        if self.wanted.captions:
            draw = view_random(self.order.seed, place, attempt, CAPTIONS)
            captions = self.texts.many(raw.texts, self.wanted.captions, draw)
        draws = (
            view_random(self.order.seed, place, attempt, TEXT_VIEWS + view) for view in range(self.wanted.text_views)
        )
        return captions, [self.texts.edited(caption, draw) for draw in draws]

    def _tokens(self, rows: list[Row], out: Columns) -> int:
        """Tokens of all texts at once; how many of the pairs' captions did not fit."""
        texts = [row.caption for row in rows]
        captions = [text for row in rows for text in row.captions]
        views = [text for row in rows for text in row.text_views]
        tokens = self.tokenize(texts + captions + views)
        own, of_captions = tokens[: len(texts)], tokens[len(texts) : len(texts) + len(captions)]
        of_views = tokens[len(texts) + len(captions) :]
        out["texts"].copy_(own)
        for name, found in (("captions", of_captions), ("text_views", of_views)):
            if name in out:
                out[name].copy_(found.view(out[name].shape))
        cut = getattr(self.tokenize, "truncated", None)
        return cut(texts, own) if cut else 0


def _layout(spec: ImageSpec, length: int, wanted: Wanted) -> Layout:
    image = (3, *spec.size)
    layout = {
        "images": Column(image, torch.uint8),
        "texts": Column((length,), torch.int64),
        "ids": Column((), torch.int64),
    }
    if wanted.image_views:
        layout["image_views"] = Column((wanted.image_views, *image), torch.uint8)
    if wanted.text_views:
        layout["text_views"] = Column((wanted.text_views, length), torch.int64)
    if wanted.captions:
        layout["captions"] = Column((wanted.captions, length), torch.int64)
        layout["caption_counts"] = Column((), torch.int64)
    empty = columns([{}], wanted.fields)
    return layout | {name: Column(tuple(column.shape[1:]), column.dtype) for name, column in empty.items()}


def _of_row(out: Columns, row: int) -> Columns:
    return {name: column[row] for name, column in out.items()}
