"""Each held-out sample exactly once, over any number of ranks, with everything that evaluation needs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config import Data
from pretrain.data.images.decode import decode
from pretrain.data.images.transforms import ImageSpec, eval_image
from pretrain.data.loader import EvalBatch, eval_loader
from pretrain.errors import UserError
from pretrain.world import World

SPEC = ImageSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def read(data: Data, words: Any, ranks: int, batch_size: int = 3) -> list[list[EvalBatch]]:
    loaders = [
        eval_loader(data, World(r, ranks, r, torch.device("cpu")), SPEC, words, batch_size) for r in range(ranks)
    ]
    assert len({loader.samples for loader in loaders}) == 1
    return [list(loader) for loader in loaders]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
def test_each_sample_once(make_shards: Any, words: Any, ranks: int) -> None:
    data = Data(eval=tuple(make_shards([4, 3])), workers=0)
    parts = read(data, words, ranks)
    assert [n for batches in parts for batch in batches for n in batch.numbers] == list(range(7)), (
        "contiguous, in rank order"
    )
    sizes = [sum(len(batch.numbers) for batch in batches) for batches in parts]
    assert max(sizes) - min(sizes) <= 1
    assert ranks < 9 or 0 in sizes


def test_what_a_batch_holds(make_shards: Any, words: Any, picture_bytes: Any) -> None:
    more = {
        1: {"png": picture_bytes(1), "txt": b""},
        2: {"png": picture_bytes(2), "json": json.dumps({"label": "x"}).encode()},
    }
    (batch,) = read(Data(eval=tuple(make_shards([4], broken=more)), workers=0), words, 1, batch_size=10)[0]
    expected = np.stack([eval_image(decode(picture_bytes(n)), SPEC) for n in range(4)])
    assert np.array_equal(batch.images.numpy(), expected)
    assert batch.captions[0] == ["caption 0 first", "caption 0 second", "caption 0 third"]
    assert batch.captions[1] == batch.captions[2] == []
    assert torch.equal(batch.texts, words(batch.captions[0] + batch.captions[3]))
    assert batch.labels == [0, None, None, 3]
    assert batch.keys[3] == "00000.tar/000003"


def test_it_can_be_read_again(make_shards: Any, words: Any) -> None:
    data = Data(eval=tuple(make_shards([4])), workers=0)
    loader = eval_loader(data, World(0, 1, 0, torch.device("cpu")), SPEC, words, 3)
    assert [b.numbers for b in loader] == [b.numbers for b in loader] == [[0, 1, 2], [3]]
    assert (len(loader), loader.samples) == (2, 4)


@pytest.mark.slow
def test_workers_change_nothing(make_shards: Any, words: Any) -> None:
    paths = tuple(make_shards([4, 3]))
    alone, many = (read(Data(eval=paths, workers=workers), words, 2) for workers in (0, 2))
    for a, b in zip(itertools.chain(*alone), itertools.chain(*many), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.texts, b.texts)
        assert a[2:] == b[2:]


def test_a_bad_held_out_sample_is_an_error(make_shards: Any, words: Any) -> None:
    paths = make_shards([4], broken={2: {"png": b"<html>", "txt": b"a"}})
    with pytest.raises(UserError, match=r"data\.eval: 00000\.tar/000002 cannot be used"):
        read(Data(eval=tuple(paths), workers=0), words, 1)


def test_no_held_out_shards_are_an_error(words: Any, tmp_path: Path) -> None:
    for data in (Data(), Data(eval=(f"{tmp_path}/*.tar",))):
        with pytest.raises(UserError, match=r"data\.eval"):
            read(data, words, 1)
    with pytest.raises(UserError, match="batch_size 0"):
        read(Data(train=("synthetic:1024",)), words, 1, batch_size=0)


def test_synthetic_held_out_pairs_are_not_the_training_pairs(words: Any) -> None:
    (batches,) = read(Data(train=("synthetic:20",), workers=0), words, 1)
    assert sum(len(batch.numbers) for batch in batches) == 20
    assert batches[0].keys[0] == "synthetic/000000020"
    assert all(label is not None for batch in batches for label in batch.labels)
