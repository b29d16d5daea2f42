"""The same global batches for any number of ranks and workers, from any sample on, whatever the shards are like."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import Data, Run, Train
from pretrain.data.images.transforms import ImageSpec, normalize
from pretrain.data.loader import BadRate, batch_digest, combine, row_digests, train_loader, train_source
from pretrain.errors import ProcessDied, UserError
from pretrain.values import Batch, Skip
from pretrain.world import World

SPEC = ImageSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BATCH = 12


def world(rank: int, size: int) -> World:
    return World(rank, size, rank, torch.device("cpu"))


def make_run(paths: list[str], batch: int = BATCH, **data: Any) -> Run:
    options = {"workers": 0, "crop_scale": (0.3, 1.0), "flip": True, "shuffle_window": 10} | data
    return Run(seed=5, data=Data(train=tuple(paths), **options), train=Train(samples=1000, global_batch=batch))


def read(run: Run, words: Any, start: int, stop: int, ranks: int = 1) -> list[list[Batch]]:
    """Batches of each rank."""
    found = []
    for rank in range(ranks):
        with train_loader(run, world(rank, ranks), SPEC, words, start, stop) as loader:
            found.append(list(loader))
    return found


def digests(ranks: list[list[Batch]]) -> list[str]:
    """Of each global batch."""
    return [combine(itertools.chain.from_iterable(map(row_digests, parts))) for parts in zip(*ranks, strict=True)]


def skips(ranks: list[list[Batch]]) -> set[Skip]:
    return {skip for batches in ranks for batch in batches for skip in batch.skips}


@pytest.fixture
def paths(make_shards: Callable[..., list[str]]) -> list[str]:
    return make_shards([7, 5, 9, 4])  # 25 samples: batches of 12 straddle epochs


def test_shapes_and_facts(paths: list[str], words: Any) -> None:
    (batches,) = read(make_run(paths), words, 0, 40)
    assert len(batches) == 3, "a last piece of 4 samples is no batch"
    batch = batches[0]
    assert (batch.images.shape, batch.images.dtype) == ((BATCH, 3, 8, 8), torch.uint8)
    assert (batch.texts.shape, batch.texts.dtype) == ((BATCH, 8), torch.int64)
    assert (batch.ids.shape, batch.ids.dtype, len(batch.keys)) == ((BATCH,), torch.int64, BATCH)
    assert batch.keys[0].split("/")[0].endswith(".tar")
    assert normalize(batch.images, SPEC).abs().max() <= 1
    seen = torch.cat([b.ids for b in batches])
    assert sorted(seen[:25].tolist()) == list(range(25)), "an epoch holds every sample once, across batches"


def test_keys_ids_and_texts_belong_together(paths: list[str], words: Any) -> None:
    for batch in read(make_run(paths), words, 0, 24)[0]:
        for number, key, text in zip(batch.ids.tolist(), batch.keys, batch.texts, strict=True):
            assert key.endswith(f"/{number:06d}")
            choices = words([f"caption {number} {word}" for word in ("first", "second", "third")])
            assert (choices == text).all(dim=1).any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_same_global_batches(paths: list[str], words: Any, ranks: int) -> None:
    run = make_run(paths)
    assert digests(read(run, words, 0, 60, ranks)) == digests(read(run, words, 0, 60))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 2), (2, 4), (3, 1), (4, 2)])
def test_any_number_of_workers_gives_the_same_global_batches(
    paths: list[str], words: Any, ranks: int, workers: int
) -> None:
    run = make_run(paths)
    other = replace(run, data=replace(run.data, workers=workers, prefetch=1 + workers % 2))
    assert digests(read(other, words, 12, 72, ranks)) == digests(read(run, words, 12, 72))


def test_more_ranks_and_workers_than_shards(make_shards: Any, words: Any) -> None:
    run = make_run(make_shards([3]))
    assert digests(read(run, words, 0, 24, 4)) == digests(read(run, words, 0, 24))


@pytest.mark.parametrize("start", [12, 24, 36, 48, 60])
def test_going_on_from_a_batch(paths: list[str], words: Any, start: int) -> None:
    """The epoch ends at 25 and 50: inside batches, before, after."""
    run = make_run(paths)
    whole = digests(read(run, words, 0, 84))
    assert digests(read(run, words, start, 84, 2)) == whole[start // BATCH :]


def test_going_on_at_the_very_end_of_an_epoch(make_shards: Any, words: Any) -> None:
    run = make_run(make_shards([12, 12]))
    whole = digests(read(run, words, 0, 72))
    assert len(set(whole)) == 6, "no epoch repeats another"
    assert digests(read(run, words, 24, 72)) == whole[2:]
    assert digests(read(run, words, 72, 72)) == []


def test_going_on_twice_in_an_epoch(make_shards: Any, words: Any) -> None:
    run = make_run(make_shards([60]))
    pieces = [digests(read(run, words, a, b, n)) for a, b, n in ((0, 12, 1), (12, 36, 3), (36, 60, 2))]
    assert list(itertools.chain.from_iterable(pieces)) == digests(read(run, words, 0, 60))


def test_going_on_from_a_sample_inside_a_batch(paths: list[str], words: Any) -> None:
    run = make_run(paths)
    rows = [row for batch in read(run, words, 0, 60)[0] for row in row_digests(batch)]
    shifted = [row for batch in read(run, words, 5, 53)[0] for row in row_digests(batch)]
    assert shifted == rows[5:53]


def test_rows_depend_on_seed_and_position_only(paths: list[str], words: Any) -> None:
    run = make_run(paths)
    fine, coarse = make_run(paths, batch=4), make_run(paths, batch=20)
    rows = [[row for batch in read(r, words, 0, 40)[0] for row in row_digests(batch)] for r in (fine, coarse)]
    assert rows[0] == rows[1]
    assert digests(read(replace(run, seed=6), words, 0, 12)) != digests(read(run, words, 0, 12))


def test_the_second_epoch_has_other_crops(paths: list[str], words: Any) -> None:
    run = make_run(paths, shuffle_window=0, text_keys=("txt",))
    first, second = read(replace(run, train=Train(samples=1, global_batch=25)), words, 0, 50)[0]
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.texts, second.texts)
    assert sum(torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True)) < 3


BROKEN = {
    3: {"png": b"<html>404</html>", "txt": b"a page"},
    8: {"png": b"", "txt": b"nothing"},
    11: {"txt": b"no picture"},
    14: {"png": b"\x89PNG\r\n\x1a\n cut", "txt": b"cut"},
    20: {"jpg": b"\xff\xd8\xff\xe0 cut", "txt": b"cut"},
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bad_samples_are_replaced_by_the_same_ones_everywhere(make_shards: Any, words: Any, ranks: int) -> None:
    run = make_run(make_shards([7, 5, 9, 4], broken=BROKEN), max_bad=1.0)
    alone, many = read(run, words, 0, 72), read(run, words, 0, 72, ranks)
    assert digests(many) == digests(alone)
    assert skips(many) == skips(alone)
    assert {int(skip.key) for skip in skips(alone)} == set(BROKEN)
    assert all(skip.shard.endswith(".tar") and skip.reason and 0 <= skip.index < 72 for skip in skips(alone))
    used = {int(n) for batch in alone[0] for n in batch.ids}
    assert not used & set(BROKEN)
    assert used == set(range(25)) - set(BROKEN)


def test_empty_captions_are_replaced_too(make_shards: Any, words: Any, picture_bytes: Any) -> None:
    broken = {2: {"png": picture_bytes(2), "txt": b" \n"}}
    found = read(make_run(make_shards([6], broken=broken), batch=6), words, 0, 6)
    assert [skip.reason for skip in skips(found)] == ["the sample has no caption"]


def test_a_hopeless_data_set_stops_the_run(make_shards: Any, words: Any) -> None:
    run = make_run(make_shards([5], broken=dict.fromkeys(range(5), BROKEN[3])))
    with pytest.raises(UserError, match=r"16 samples in a row cannot be used.*00000\.tar/0000") as caught:
        read(run, words, 0, 12)
    assert "\n" not in str(caught.value)


def test_bad_rate() -> None:
    skip = Skip(0, "a.tar", "k", "why")
    rate = BadRate(0.001)
    for _ in range(9):
        rate.add(1000, [skip])
    with pytest.raises(UserError, match=r"data\.max_bad 0\.001: 11 of the last 9001 .*a\.tar \(11\).*why \(11\)"):
        rate.add(1, [skip, skip])
    steady = BadRate(0.001)
    for _ in range(100):
        steady.add(1000, [skip])
    strict = BadRate(0.0)
    strict.add(10, [skip] * 9)
    with pytest.raises(UserError, match=r"max_bad"):
        strict.add(10, [skip])


def test_a_small_data_set_that_is_bad_stops_a_run_before_10000_samples() -> None:
    skip = Skip(0, "a.tar", "k", "why")
    burst = BadRate(0.05)
    burst.add(100, [skip] * 50)  # of at least 1,000, so that a bad stretch at the start is no verdict
    with pytest.raises(UserError, match="51 of the last 101 samples"):
        burst.add(1, [skip])
    late = BadRate(0.05)
    late.add(2000, [skip] * 100)
    with pytest.raises(UserError, match="101 of the last 2000 samples"):
        late.add(0, [skip])


def test_a_run_that_stops_sums_up_what_was_bad_by_shard_and_reason() -> None:
    rate = BadRate(0.0)
    reasons = ["cut at byte 12", "cut at byte 7", "no image", "empty", "not utf-8", "cut at byte 9"]
    found = [Skip(n, f"{n % 5}.tar", f"{n:03d}", reason) for n, reason in enumerate(reasons * 2)]
    with pytest.raises(UserError) as caught:
        rate.add(100, found)
    assert str(caught.value) == (
        "data.max_bad 0.0: 12 of the last 100 samples could not be used; by shard: 0.tar (3), 1.tar (3), 2.tar (2) "
        "and 2 more; by reason: cut at byte 12 (6), empty (2), no image (2) and 1 more; the last: 1.tar/011; repair "
        "the shards or raise it"
    )


def test_too_many_bad_samples_stop_the_run(make_shards: Any, words: Any) -> None:
    run = make_run(make_shards([7, 5, 9, 4], broken=BROKEN), max_bad=0.001)
    with pytest.raises(UserError, match=r"data\.max_bad"):
        read(run, words, 0, 600)


def test_a_changed_shard_has_another_fingerprint(make_shards: Any, words: Any) -> None:
    paths = make_shards([5, 5])
    run = make_run(paths)
    before = train_source(run.data, world(0, 1), SPEC).fingerprint
    for rank in range(3):
        assert train_source(run.data, world(rank, 3), SPEC).fingerprint == before
    make_shards([5, 5], broken={7: BROKEN[3]})
    with train_loader(run, world(0, 1), SPEC, words, 0, 12) as loader:
        assert loader.fingerprint != before
        assert loader.samples_per_epoch == 10


def test_digest_depends_on_keys_pixels_tokens_and_order(paths: list[str], words: Any) -> None:
    batch = read(make_run(paths), words, 0, 12)[0][0]
    changed = [
        replace(batch, keys=("other", *batch.keys[1:])),
        replace(batch, images=batch.images.clone().index_fill_(0, torch.tensor([3]), 9)),
        replace(batch, texts=batch.texts + 1),
        replace(batch, images=batch.images.flip(0), texts=batch.texts.flip(0), keys=batch.keys[::-1]),
    ]
    found = {batch_digest(item) for item in (batch, *changed)}
    assert len(found) == 5
    assert batch_digest(batch) == combine(row_digests(batch))


def test_counts_waiting_and_truncation(paths: list[str]) -> None:
    from pretrain.data.texts.tokenizer import build

    with train_loader(make_run(paths), world(0, 1), SPEC, build("ViT-B-32", context_length=4), 0, 24) as loader:
        assert sum(1 for _ in loader) == len(loader) == 2
        assert loader.work.truncated == 24, "caption, number and word do not fit 4 tokens with start and end"
        assert loader.wait_s > 0


def test_synthetic_needs_no_disk(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(["synthetic:30"])
    assert digests(read(run, words, 0, 60, 3)) == digests(read(run, words, 0, 60))
    assert not list(tmp_path.iterdir())
    batch = read(run, words, 0, 12)[0][0]
    assert batch.images.float().std() > 20
    assert len({bytes(row.numpy().tobytes()) for row in batch.images}) == 12


def test_impossible_divisions_and_empty_sets(make_shards: Any, words: Any) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch 12 is not a multiple of 5"):
        train_loader(make_run(make_shards([3])), world(0, 5), SPEC, words, 0, 12)
    with pytest.raises(UserError, match=r"data\.train: .* holds no samples"):
        train_loader(make_run(make_shards([0], folder="none")), world(0, 1), SPEC, words, 0, 12)


def test_real_photographs(photos: list[Path], words: Any, tmp_path: Path, tar_writer: Any) -> None:
    samples = {p.stem: {"jpg": p.read_bytes(), "txt": p.with_suffix(".txt").read_bytes()} for p in photos[:12]}
    run = make_run([tar_writer(tmp_path / "p.tar", samples)])
    found = read(run, words, 0, 24, 2)
    assert skips(found) == set()
    assert digests(found) == digests(read(run, words, 0, 24))


def children() -> set[int]:
    """Processes of this one that run, or that nobody has waited for."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


@pytest.mark.slow
def test_workers_outlive_the_schedulers_signals(words: Any) -> None:
    before = children()
    run = make_run(["synthetic:30"], workers=2, prefetch=1)
    with train_loader(run, world(0, 1), SPEC, words, 0, 120) as loader:
        batches, own = [next(iter(loader))], children() - before
        assert len(own) == 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            for pid in own:
                os.kill(pid, number)
        batches += list(loader)
    assert len(batches) == 10
    assert not children() & own, "closing ends the workers"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_killed_worker_is_an_error_that_names_it_and_the_signal(words: Any, number: signal.Signals) -> None:
    before = children()
    run = make_run(["synthetic:30"], workers=2, prefetch=1)
    with train_loader(run, world(1, 2), SPEC, words, 0, 12_000) as loader:
        next(iter(loader))
        own = children() - before
        pid = max(own)
        os.kill(pid, number)
        with pytest.raises(ProcessDied) as caught:
            list(loader)
        assert not children() & own, "the error ends the other worker"
    said = rf"data\.workers: worker [01] of rank 1 \(pid {pid}\) was killed by signal {number.value} \({number.name}"
    assert re.search(said, str(caught.value))
    assert number != signal.SIGKILL or "lower data.workers / data.prefetch" in str(caught.value)


@pytest.mark.slow
def test_a_mistake_found_in_a_worker_is_one_line(make_shards: Any, words: Any) -> None:
    paths = make_shards([24])
    run = make_run(paths, workers=1)
    with train_loader(run, world(0, 1), SPEC, words, 0, 24) as loader:
        os.utime(paths[0], ns=(1, 1))
        with pytest.raises(UserError, match="changed while it was in use") as caught:
            list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_on_a_gpu_equal_those_on_the_cpu(words: Any) -> None:
    run = make_run(["synthetic:30"], workers=2)
    with train_loader(run, World(0, 1, 0, torch.device("cuda", 0)), SPEC, words, 0, 120) as loader:
        found = [(batch.images.device.type, batch_digest(batch)) for batch in loader]
    assert found == [("cuda", digest) for digest in digests(read(run, words, 0, 120))]


def test_a_start_says_how_well_the_data_is_mixed(
    make_shards: Any, words: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(make_shards([30, 30]), cache_dir=str(tmp_path / "cache"), cache_gb=1.2e-4)
    with caplog.at_level("INFO", "pretrain"):
        for rank in range(2):
            train_loader(run, world(rank, 2), SPEC, words, 0, 12).close()
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"data: 60 samples in 2 shards; \d\d\.\d+% of the pairs in a batch of 12 .* uniform.*", said), (
        said
    )
    monkeypatch.setattr("pretrain.data.storage.is_local", lambda name: False)
    source = train_source(run.data, world(0, 1), SPEC)
    caplog.clear()
    train_loader(run, world(0, 1), SPEC, words, 0, 12, source).close()
    assert "set data.shuffle_chunk 0 in a new run" in caplog.messages[-1]
    whole = replace(run, data=replace(run.data, shuffle_chunk=0))
    caplog.clear()
    train_loader(whole, world(0, 1), SPEC, words, 0, 12, source).close()
    assert not any("shuffle_chunk" in message for message in caplog.messages)
