"""The same global batches, to the last bit of pixels and tokens, for any number of ranks and workers, from any start.

Every case of which some loader has shipped the failure (research on data loaders, A.3), and the test that holds it:

    second resume in the same epoch (KempnerForge #57)       test_resumed_again_and_again_on_other_numbers
    resume at the epoch boundary (torchdata #1437)           test_resumed_at_the_end_of_an_epoch_it_goes_on
    ... trains 0 steps and exits 0 (verl #5725)              test_resumed_at_the_end_of_an_epoch_it_goes_on
    state loaded after iter() ignored (prime-rl #3332)       test_the_position_is_fixed_at_construction
    1 -> 2 -> 4 -> 3 ranks, 0 -> 4 -> 2 workers              test_any_ranks_and_workers and the first one
    kill -9, restart without cleaning (MosaicML #781)        test_killed_it_starts_again_without_cleaning
    ... of a worker                                          test_a_killed_worker_costs_nothing_but_a_restart
    fewer shards than ranks x workers (wds #188)             test_fewer_shards_than_ranks_times_workers
    truncated tar, HTML as .jpg, CMYK, 16 bits, bombs, ...   test_bad_data.py, test_decode.py, test_captions.py
    ... the same replacements everywhere                     test_replacements_are_the_same_everywhere
    connection reset in mid shard                            storage/test_faults.py
    shard replaced between runs                              test_index.py: the fingerprint names it
    10^9 samples, O(1) for each                              test_order.py
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import Data, Run, Train
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.loader import combine, row_digests, train_loader
from pretrain.data.wanted import Wanted
from pretrain.errors import ProcessDied
from pretrain.world import World

ROOT = Path(__file__).resolve().parents[2]
SPEC = ImageSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BATCH = 24
RANKS = (1, 2, 3, 4, 6, 8)
WORKERS = (0, 1, 4)
WANTED = Wanted.of(["captions:2", "image_views:1", "text_views:2", "meta:label"])


def make_run(paths: list[str], **data: Any) -> Run:
    options = {
        "workers": 0,
        "crop_scale": (0.3, 1.0),
        "flip": True,
        "shuffle_window": 20,
        "augment": ("grayscale=0.3",),
    }
    return Run(
        seed=11, data=Data(train=tuple(paths), **(options | data)), train=Train(samples=1000, global_batch=BATCH)
    )


def rows(run: Run, words: Any, start: int, stop: int, rank: int, ranks: int) -> list[list[str]]:
    """Digests of the rows of this rank's batches, with every column beside the pair."""
    found = []
    world = World(rank, ranks, rank, torch.device("cpu"))
    with train_loader(run, world, SPEC, words, start, stop, wanted=WANTED) as loader:
        for batch in loader:
            columns = [batch.extra[name].tolist() for name in sorted(batch.extra)]
            assert len(columns) == 5
            found.append([f"{row}{rest}" for row, *rest in zip(row_digests(batch), *columns, strict=True)])
    return found


def digests(run: Run, words: Any, start: int, stop: int, ranks: int = 1, workers: int = 0) -> list[str]:
    """Of each global batch."""
    run = replace(run, data=replace(run.data, workers=workers, prefetch=1 + workers % 3))
    parts = [rows(run, words, start, stop, rank, ranks) for rank in range(ranks)]
    return [combine(itertools.chain.from_iterable(batch)) for batch in zip(*parts, strict=True)]


@pytest.fixture
def run(make_shards: Callable[..., list[str]]) -> Run:
    return make_run(make_shards([17, 5, 23, 16]))  # 61 samples: epochs end inside batches 2, 5, 7


def sizes() -> list[Any]:
    marks = {4: [pytest.mark.slow]}
    return [pytest.param(r, w, marks=marks.get(w, ()), id=f"{r}x{w}") for r in RANKS for w in WORKERS]


@pytest.mark.parametrize(("ranks", "workers"), sizes())
def test_any_ranks_and_workers(run: Run, words: Any, ranks: int, workers: int) -> None:
    """A fresh start, and a start in mid epoch, over two ends of epochs."""
    whole = digests(run, words, 0, 5 * BATCH)
    assert len(set(whole)) == 5
    assert digests(run, words, 0, 5 * BATCH, ranks, workers) == whole
    assert digests(run, words, BATCH, 3 * BATCH, ranks, workers) == whole[1:3]


@pytest.mark.parametrize(
    "sizes",
    [
        [(1, 0), (2, 1), (4, 0), (3, 1)],
        pytest.param([(8, 0), (1, 4), (6, 1), (2, 2)], marks=pytest.mark.slow),
    ],
)
def test_resumed_again_and_again_on_other_numbers(make_shards: Any, words: Any, sizes: list[tuple[int, int]]) -> None:
    run = make_run(make_shards([100, 96]))  # one epoch is longer than all of it: every resume is in the same one
    whole = digests(run, words, 0, 8 * BATCH)
    pieces = [digests(run, words, 2 * n * BATCH, 2 * (n + 1) * BATCH, *size) for n, size in enumerate(sizes)]
    assert list(itertools.chain.from_iterable(pieces)) == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_at_the_end_of_an_epoch_it_goes_on(make_shards: Any, words: Any, workers: int) -> None:
    run = make_run(make_shards([30, 18]))  # two batches an epoch
    whole = digests(run, words, 0, 6 * BATCH)
    assert len(set(whole)) == 6, "no epoch repeats another"
    for ends in (2, 4):
        assert digests(run, words, ends * BATCH, 6 * BATCH, 2, workers) == whole[ends:]
    assert digests(run, words, 6 * BATCH, 6 * BATCH, 2, workers) == [], "only the end of the run is the end"


def test_the_position_is_fixed_at_construction(run: Run, words: Any) -> None:
    """There is no state to load, so none can come too late; and asking twice for an iterator starts nothing anew."""
    world = World(0, 1, 0, torch.device("cpu"))
    with train_loader(run, world, SPEC, words, BATCH, 4 * BATCH) as loader:
        assert not hasattr(loader, "load_state_dict")
        first = next(iter(loader))
        others = list(loader)
    with train_loader(run, world, SPEC, words, BATCH, 4 * BATCH) as loader:
        again = list(loader)
    assert [batch.ids.tolist() for batch in (first, *others)] == [batch.ids.tolist() for batch in again]
    assert len(again) == 3


@pytest.mark.parametrize("counts", [[1], [25], [3, 2]])
@pytest.mark.parametrize(("ranks", "workers"), [(8, 0), (3, 1), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_fewer_shards_than_ranks_times_workers(
    make_shards: Any, words: Any, counts: list[int], ranks: int, workers: int
) -> None:
    run = make_run(make_shards(counts))
    assert digests(run, words, 0, 3 * BATCH, ranks, workers) == digests(run, words, 0, 3 * BATCH)


@pytest.mark.parametrize(("ranks", "workers"), [(4, 0), (2, 1), pytest.param(3, 4, marks=pytest.mark.slow)])
def test_replacements_are_the_same_everywhere(make_shards: Any, words: Any, ranks: int, workers: int) -> None:
    broken = {n: {"png": b"<html>", "txt": b"x"} for n in (2, 3, 11, 30)}
    run = make_run(make_shards([20, 20], broken=broken), max_bad=1.0)
    assert digests(run, words, 0, 4 * BATCH, ranks, workers) == digests(run, words, 0, 4 * BATCH)


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_mixtures_are_elastic_too(make_shards: Any, words: Any, weights: tuple[float, ...]) -> None:
    first, second = make_shards([9, 8], folder="a"), make_shards([13], folder="b")
    patterns = [str(Path(first[0]).parent / "*.tar"), second[0]]
    run = make_run(patterns, weights=weights, shuffle_chunk=4)
    whole = digests(run, words, 0, 4 * BATCH)
    assert digests(run, words, 2 * BATCH, 4 * BATCH, 3, 1) == whole[2:]


TRAINER = """
import sys, time, torch
from dataclasses import replace
sys.path.insert(0, {tests!r})
from conftest import Words
from test_elastic import BATCH, SPEC, World, digests, make_run, train_loader

start, last, *paths = sys.argv[1:]
run = make_run(paths)
for batch in range(int(start), min(int(last) + 1, 6)):
    print(*digests(run, Words(), batch * BATCH, (batch + 1) * BATCH, workers=2), flush=True)
if int(last) < 6:
    run = replace(run, data=replace(run.data, workers=2))
    loader = train_loader(run, World(0, 1, 0, torch.device("cpu")), SPEC, Words(), 0, 9999 * BATCH)
    next(iter(loader))
    print("workers are at work", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_killed_it_starts_again_without_cleaning(make_shards: Any, words: Any) -> None:
    """kill -9 of a process whose workers are at work, twice, then to the end; indexes and all else stay as they lay."""
    paths = make_shards([17, 5, 23, 16])
    source = TRAINER.format(tests=str(Path(__file__).parent))
    found, start = list[str](), 0
    for kill_after in (1, 3, 99):
        command = [sys.executable, "-c", source, str(start), str(kill_after), *paths]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
            assert trainer.stdout is not None
            for line in trainer.stdout:
                if line.startswith("workers"):
                    trainer.send_signal(signal.SIGKILL)
                    break
                found.append(line.strip())
        start = kill_after + 1
    assert found == digests(make_run(paths), words, 0, 6 * BATCH)


def test_a_killed_worker_costs_nothing_but_a_restart(run: Run, words: Any) -> None:
    whole = digests(run, words, 0, 5 * BATCH)
    killed = replace(run, data=replace(run.data, workers=1, prefetch=1))
    world, before = World(0, 1, 0, torch.device("cpu")), _children()
    with train_loader(killed, world, SPEC, words, 0, 500 * BATCH) as loader:
        next(iter(loader))
        (pid,) = _children() - before
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ProcessDied):
            list(loader)
    assert digests(killed, words, BATCH, 5 * BATCH, 2, 1) == whole[1:]


def _children() -> set[int]:
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
