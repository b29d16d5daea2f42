"""Samples that a run leaves out: positions by a pure function, batches by any number of ranks and from any start."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import Choice, Data, Run, Train
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.left_out import merged, position
from pretrain.data.loader import train_loader
from pretrain.objectives.clip import Clip
from pretrain.world import World

stretches = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda pair: (pair[0], sum(pair))), max_size=6
)


@given(stretches)
def test_positions_are_those_that_are_left_in_order(left: list[tuple[int, int]]) -> None:
    gone = {place for start, stop in left for place in range(start, stop)}
    kept = [place for place in range(200) if place not in gone]
    assert [position(sample, merged(left)) for sample in range(100)] == kept[:100]


SPEC = ImageSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "shortest")


def words(texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 4, dtype=torch.int64)


def keys(
    rank: int, size: int, start: int, stop: int, without: tuple[tuple[int, int], ...] = ()
) -> list[tuple[str, ...]]:
    run = Run(
        data=Data(train=("synthetic:64",), workers=0),
        train=Train(samples=640, global_batch=8),
        objective=(Choice("clip", Clip.Options()),),
    )
    world = World(rank, size, rank, torch.device("cpu"))
    with train_loader(run, world, SPEC, words, start, stop, without=without) as loader:
        return [batch.keys for batch in loader]


def test_batches_go_on_behind_what_is_left_out_on_any_ranks_from_any_start() -> None:
    everything = keys(0, 1, 0, 160)
    without = ((16, 32), (56, 64))
    kept = [rows for n, rows in enumerate(everything) if n not in (2, 3, 7)]
    assert keys(0, 1, 0, 96, without) == kept[:12]
    assert keys(0, 1, 40, 96, without) == kept[5:12]
    one, other = keys(0, 2, 0, 96, without), keys(1, 2, 0, 96, without)
    assert [a + b for a, b in zip(one, other, strict=True)] == kept[:12]
