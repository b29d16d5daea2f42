"""Captions, views and metadata that objectives ask for: of their own sample, and the same on any ranks and workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain.config import Data, Run, Train
from pretrain.data.digest import combine, row_digests
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.loader import train_loader
from pretrain.data.wanted import Wanted
from pretrain.values import Batch
from pretrain.world import World

SPEC = ImageSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BATCH, SAMPLES = 12, 60
NEEDS = (
    "captions:4",
    "image_views:2",
    "text_views:2",
    "meta:label",
    "meta:label2:float",
    "meta:kind:text",
    "meta:box:4:float",
)


def batches(paths: list[str], words: Any, rank: int = 0, ranks: int = 1, start: int = 0, **data: Any) -> list[Batch]:
    """One rank's, with every further column, up to the position SAMPLES."""
    options: dict[str, Any] = {"workers": 0, "crop_scale": (0.3, 1.0), "shuffle_window": 20} | data
    run = Run(seed=5, data=Data(train=tuple(paths), **options), train=Train(samples=1000, global_batch=BATCH))
    world = World(rank, ranks, rank, torch.device("cpu"))
    with train_loader(run, world, SPEC, words, start, SAMPLES, None, Wanted.of(NEEDS)) as loader:
        return list(loader)


def digests(paths: list[str], words: Any, ranks: int = 1, **options: Any) -> list[str]:
    """Of each global batch."""
    parts = zip(*(batches(paths, words, rank, ranks, **options) for rank in range(ranks)), strict=True)
    return [combine(row for part in rank_parts for row in row_digests(part)) for rank_parts in parts]


@pytest.fixture
def paths(make_shards: Callable[..., list[str]]) -> list[str]:
    return make_shards([7, 5, 8])


def tokens(words: Any, texts: list[str]) -> set[tuple[int, ...]]:
    return {tuple(row) for row in words(texts).tolist()}


def test_columns_are_those_of_the_sample(paths: list[str], words: Any) -> None:
    seen = 0
    for batch in batches(paths, words, text_edits=("delete=0.5",)):
        assert {k: (tuple(v.shape), v.dtype) for k, v in batch.extra.items()} == {
            "captions": ((BATCH, 4, 8), torch.int64),
            "caption_counts": ((BATCH,), torch.int64),
            "image_views": ((BATCH, 2, 3, 8, 8), torch.uint8),
            "text_views": ((BATCH, 2, 8), torch.int64),
            "meta:label": ((BATCH,), torch.int64),
            "meta:label2": ((BATCH,), torch.float32),
            "meta:kind": ((BATCH,), torch.int64),
            "meta:box": ((BATCH, 4), torch.float32),
        }
        for row in range(BATCH):
            number, extra = int(batch.ids[row]), {name: column[row] for name, column in batch.extra.items()}
            own = tokens(words, [f"caption {number} {word}" for word in ("first", "second", "third")])
            drawn = [tuple(text) for text in extra["captions"].tolist()]
            assert set(drawn[:3]) == own
            assert drawn[3] == drawn[0]
            assert (extra["caption_counts"], extra["meta:label"]) == (3, number % 7)
            assert extra["meta:kind"] == -1
            assert bool(extra["meta:box"].isnan().all() and extra["meta:label2"].isnan())
            caption = batch.texts[row]
            for view in extra["text_views"]:
                left = view[view != 0]
                assert 1 <= len(left) <= 3
                assert set(left.tolist()) <= set(caption.tolist())
            seen += int((extra["text_views"] != caption).any())
            images = {batch.images[row].numpy().tobytes(), *(view.numpy().tobytes() for view in extra["image_views"])}
            assert len(images) == 3, "every view is drawn anew"
    assert seen > SAMPLES // 2


def test_further_columns_change_nothing_of_the_pairs(paths: list[str], words: Any) -> None:
    run = Run(
        seed=5,
        data=Data(train=tuple(paths), workers=0, crop_scale=(0.3, 1.0), shuffle_window=20),
        train=Train(samples=1000, global_batch=BATCH),
    )
    with train_loader(run, World(0, 1, 0, torch.device("cpu")), SPEC, words, 0, SAMPLES) as loader:
        for plain, wide in zip(loader, batches(paths, words), strict=True):
            assert not plain.extra
            assert torch.equal(plain.images, wide.images)
            assert torch.equal(plain.texts, wide.texts)
            assert plain.keys == wide.keys


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 0), (3, 2), (4, 1)])
def test_ranks_and_workers_do_not_show(ranks: int, workers: int, paths: list[str], words: Any) -> None:
    knobs = {"text_weights": (1.0, 1.0, 3.0), "sentences": 1, "text_edits": ("swap=0.5", "repeat=0.3", "crop=0.3-1")}
    expected = digests(paths, words, **knobs)
    assert len(set(expected)) == SAMPLES // BATCH
    assert digests(paths, words, ranks, workers=workers, **knobs) == expected
    assert digests(paths, words, ranks, workers=workers, start=2 * BATCH, **knobs) == expected[2:]


def test_a_digest_tells_columns_apart(paths: list[str], words: Any) -> None:
    batch = batches(paths, words)[0]
    before = row_digests(batch)
    for name, column in batch.extra.items():
        kept = column[3].clone()
        column[3] = column[3] + 1 if name not in ("meta:label2", "meta:box") else 0.5
        after = row_digests(batch)
        assert [row for row in range(BATCH) if before[row] != after[row]] == [3], name
        column[3] = kept


def test_metadata_of_a_wrong_type_is_a_bad_sample(
    make_shards: Callable[..., list[str]], picture_bytes: Callable[..., bytes], words: Any
) -> None:
    wrong = {"png": picture_bytes(4), "txt": b"caption", "json": json.dumps({"label": "four"}).encode()}
    paths = make_shards([7, 5, 8], {4: wrong})
    found = batches(paths, words, max_bad=1.0)
    skips = [skip for batch in found for skip in batch.skips]
    assert {skip.key for skip in skips} == {"000004"}
    assert skips[0].reason == "the field 'label' holds 'four': an integer of 64 bits is needed"
    assert all("000004" not in key for batch in found for key in batch.keys)
    together = zip(*(batches(paths, words, rank, 3, max_bad=1.0) for rank in range(3)), strict=True)
    assert [combine(row_digests(batch)) for batch in found] == [
        combine(row for part in parts for row in row_digests(part)) for parts in together
    ]
