"""Reading samples: few reads, many threads, remote shards, counts from a file, captions from tables beside shards."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pickle
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import record
from pretrain.config import Data, Run, Train
from pretrain.data import storage
from pretrain.data.digest import combine, row_digests
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.loader import train_loader, train_source
from pretrain.data.patterns import Entry
from pretrain.data.shards import facts as shards
from pretrain.data.shards import fingerprint, indexing, parquet
from pretrain.data.shards.fingerprint import Fact, differences, summary
from pretrain.data.shards.index_helpers import Helpers
from pretrain.data.shards.opened import OpenShards
from pretrain.data.shards.reader import ShardSource, spans
from pretrain.data.storage import Stat
from pretrain.data.texts.captions import MAX_TEXT_BYTES
from pretrain.errors import UserError
from pretrain.world import World

SPEC = ImageSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_spec = importlib.util.spec_from_file_location("storage_servers", Path(__file__).parent / "storage" / "servers.py")
assert _spec is not None
servers = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = servers
_spec.loader.exec_module(servers)  # type: ignore[union-attr]


class Watched:
    """A storage of local files that counts, and whose blobs notice reads after they are closed."""

    def __init__(self, parts: dict[str, bytes] | None = None) -> None:
        self.local, self.parts = storage.make(Data()), parts or {}
        self.stats, self.opens, self.reads = Counter[str](), Counter[str](), list[tuple[int, int]]()
        self.most_open = self.now_open = 0
        self.lock = threading.Lock()

    def stat(self, name: str) -> Stat:
        self.stats[os.path.basename(name)] += 1
        return self.local.stat(name)

    def open(self, name: str, stat: Stat | None = None) -> Any:
        blob = WatchedBlob(self, self.local.open(name, stat))
        with self.lock:
            self.opens[os.path.basename(name)] += 1
            self.now_open += 1
            self.most_open = max(self.most_open, self.now_open)
        return blob

    def names(self, pattern: str) -> list[str]:
        return self.local.names(pattern)

    def write(self, name: str, content: bytes) -> None:
        self.local.write(name, content)


class WatchedBlob:
    def __init__(self, owner: Watched, blob: Any) -> None:
        self.owner, self.blob, self.stat, self.closed = owner, blob, blob.stat, False

    def read(self, offset: int, size: int) -> bytes:
        assert not self.closed
        self.owner.reads.append((offset, size))
        content: bytes = self.blob.read(offset, size)
        assert not self.closed, "closed under a reader"
        return content

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        with self.owner.lock:
            self.owner.now_open -= 1
        self.blob.close()


def everything(source: Any) -> list[Any]:
    return [source.sample(number) for number in range(len(source))]


def test_spans() -> None:
    assert spans([(0, 10), (1000, 5), (20, 5)], 10) == [(0, 25), (1000, 1005)]
    assert spans([(0, 10), (1000, 5), (20, 5)], 9) == [(0, 10), (20, 25), (1000, 1005)]
    assert spans([(0, 100), (10, 5), (100, 0)], 0) == [(0, 100)]


def test_a_sample_is_one_read_unless_something_large_lies_inside(
    tmp_path: Path, tar_writer: Any, picture_bytes: Any
) -> None:
    members = {"png": picture_bytes(1), "txt": b"one", "json": b'{"a": 1}'}
    apart = {"png": members["png"], "npy": bytes(1 << 20), "txt": b"two", "json": b"{}"}
    path = tar_writer(tmp_path / "a.tar", {"near": members, "far": apart})
    watched = Watched()
    source = ShardSource([path], Data(), watched)
    watched.reads.clear()
    assert source.sample(0).captions == ["one"]
    assert len(watched.reads) == 1
    assert source.sample(1).captions == ["two"]
    assert len(watched.reads) == 3, "the array between the picture and the text is not read"
    assert sum(size for _, size in watched.reads) < 1 << 16


def test_what_is_too_large_is_not_read(tmp_path: Path, tar_writer: Any, picture_bytes: Any) -> None:
    path = tar_writer(tmp_path / "a.tar", {"a": {"png": picture_bytes(1), "txt": b"x" * (MAX_TEXT_BYTES + 1)}})
    watched = Watched()
    source = ShardSource([path], Data(), watched)
    watched.reads.clear()
    with pytest.raises(Exception, match=f"txt member has {MAX_TEXT_BYTES + 1} bytes"):
        source.sample(0)
    assert watched.reads == []


def test_threads_read_at_once_from_more_shards_than_may_be_open(make_shards: Any) -> None:
    watched = Watched()
    source = ShardSource(make_shards([3] * 12), Data(), watched)
    expected = everything(source)
    source._open = OpenShards(source._open_one, most=3)
    watched.opens.clear()
    assert watched.now_open == 12
    numbers = [(n * 7 + turn * 5) % 36 for turn in range(40) for n in range(36)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.sample, numbers))
    assert found == [expected[number] for number in numbers]
    assert len(source._open) == 3
    assert watched.now_open == 12 + 3, "what was evicted is closed, once nobody reads it"
    assert sum(watched.opens.values()) > 12


def test_one_slow_shard_does_not_hold_up_the_others(make_shards: Any) -> None:
    source = ShardSource(make_shards([2, 2]), Data())
    opening, go = threading.Event(), threading.Event()
    real = source._open_one

    def slow(turn: int) -> Any:
        if turn == 0:
            opening.set()
            assert go.wait(20)
        return real(turn)

    source._open = OpenShards(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(source.sample, 0)
        assert opening.wait(20)
        assert source.sample(2).key.startswith("00001.tar/")
        go.set()
        assert first.result().key.startswith("00000.tar/")


def test_a_copy_for_another_process_has_no_open_files(make_shards: Any) -> None:
    source = ShardSource(make_shards([2, 3]), Data())
    expected = everything(source)
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy._open) == 0
    assert everything(copy) == expected
    assert (copy.fingerprint, copy.counts, copy.entries) == (source.fingerprint, [2, 3], [2])


def test_an_index_that_is_damaged_or_replaced_in_use_is_refused(make_shards: Any) -> None:
    paths = make_shards([2, 2])
    source = ShardSource(paths, Data())
    index = Path(f"{paths[0]}.index")
    raw = index.read_bytes()
    index.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(UserError, match=r"00000\.tar\.index: changed while it was in use"):
        source.sample(0)
    index.unlink()
    with pytest.raises(UserError, match=r"00000\.tar\.index: changed while it was in use"):
        source.sample(1)
    assert source.sample(2)


def test_entries_and_weights(make_shards: Any) -> None:
    paths = make_shards([2, 3, 4])
    entries = [Entry(paths[:2], 2.0), Entry(paths[2:], 1.0)]
    source = ShardSource(entries, Data(train=("a", "b")))
    assert (source.entries, source.weights, source.counts) == ([2, 1], [2.0, 1.0], [2, 3, 4])
    assert [fact.entry for fact in source.facts] == [0, 0, 1]
    knob = ShardSource(entries, Data(train=("a", "b"), weights=(0.25, 0.75)))
    assert knob.weights == [0.25, 0.75]
    assert ShardSource(entries, Data(train=("a", "b"), weights=(1.0, 2.0)), field="data.eval").weights == [2.0, 1.0]
    assert ShardSource([Entry(paths)], Data()).weights == []
    with pytest.raises(UserError, match=r"1 of 2 entries have a weight"):
        ShardSource([Entry(paths[:1], 1.0), Entry(paths[1:])], Data())
    with pytest.raises(UserError, match=r"data\.weights .*3 entries"):
        ShardSource([Entry([path]) for path in paths], Data(train=("a", "b"), weights=(1.0, 2.0)))
    (empty,) = make_shards([0], folder="empty")
    with pytest.raises(UserError, match=r"data\.train: entry 2 of 2, .*00000\.tar, holds no samples"):
        ShardSource([Entry(paths, 1.0), Entry([empty], 1.0)], Data())
    assert len(ShardSource([Entry(paths), Entry([empty])], Data())) == 9, "without weights it is one data set"


# Remote shards


@pytest.fixture
def web(make_shards: Any) -> Iterator[Any]:
    made = servers.Web()
    for path in make_shards([40, 30]):
        made.files[f"/{os.path.basename(path)}"] = Path(path).read_bytes()
    yield made
    made.close()


def names(web: Any) -> list[str]:
    return [web.url(f"/{name:05d}.tar") for name in range(2)]


def test_remote_shards_are_indexed_by_few_large_reads(web: Any, tmp_path: Path, make_shards: Any) -> None:
    data = Data(index_dir=str(tmp_path / "indexes"))
    source = ShardSource(names(web), data)
    assert Counter(request.path for request in web.gets()) == {"/00000.tar": 1, "/00001.tar": 1}
    web.log.clear()
    local = ShardSource(make_shards([40, 30]), Data())
    assert everything(source) == everything(local)
    assert source.fingerprint == local.fingerprint
    assert len(web.gets()) == 70, "one request a sample"
    web.log.clear()
    assert ShardSource(names(web), data).fingerprint == local.fingerprint
    assert web.gets() == [], "the index is there"


def test_large_members_of_remote_shards_are_passed_over(
    web: Any, tmp_path: Path, tar_writer: Any, monkeypatch: Any
) -> None:
    members = {f"{n}": {"npy": bytes(200_000), "txt": b"x"} for n in range(4)}
    web.files["/big.tar"] = Path(tar_writer(tmp_path / "big.tar", members)).read_bytes()
    monkeypatch.setattr(indexing, "_REMOTE_READ", 1 << 16)
    assert len(ShardSource([web.url("/big.tar")], Data(index_dir=str(tmp_path / "i")))) == 4
    asked = sum(last - first + 1 for first, last in (request.range for request in web.gets()))
    assert asked < len(web.files["/big.tar"]) / 2


def test_where_indexes_of_remote_shards_are_kept(web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    kept = lambda folder: sorted(path.name.rpartition("-")[0] for path in (tmp_path / folder).iterdir())  # noqa: E731
    ShardSource(names(web), Data())
    assert kept("xdg/pretrain/indexes") == ["00000.tar", "00001.tar"]
    ShardSource(names(web), Data(cache_dir=str(tmp_path / "cache")))
    assert kept("cache/indexes") == ["00000.tar", "00001.tar"]
    ShardSource(names(web), Data(cache_dir=str(tmp_path / "cache"), index_dir=str(tmp_path / "own")))
    assert kept("own") == ["00000.tar", "00001.tar"]


def test_a_remote_shard_that_was_replaced_has_a_new_index(web: Any, tmp_path: Path) -> None:
    data = Data(index_dir=str(tmp_path / "indexes"))
    before = ShardSource(names(web), data)
    web.files["/00000.tar"] = web.files["/00001.tar"]
    with pytest.raises(UserError, match=r"00000\.tar: changed while it was in use"):
        before.sample(0)
    after = ShardSource(names(web), data)
    assert (after.counts, before.counts) == ([30, 30], [40, 30])
    assert after.fingerprint != before.fingerprint
    del web.files["/00001.tar"]
    with pytest.raises(UserError, match=r"00001\.tar"):
        ShardSource(names(web), data)


@pytest.mark.slow
def test_workers_read_remote_shards(web: Any, tmp_path: Path, make_shards: Any, words: Any) -> None:
    def read(paths: list[str], workers: int, ranks: int) -> list[str]:
        data = Data(train=tuple(paths), workers=workers, index_dir=str(tmp_path / "indexes"))
        run, rows = Run(data=data, train=Train(samples=1, global_batch=12)), []
        for rank in range(ranks):
            world = World(rank, ranks, rank, torch.device("cpu"))
            source = train_source(data, world, SPEC)
            source.sample(0)  # a connection that workers must not share
            with train_loader(run, world, SPEC, words, 0, 84, source) as loader:
                rows.append([row_digests(batch) for batch in loader])
        return [combine(itertools.chain.from_iterable(parts)) for parts in zip(*rows, strict=True)]

    assert read(names(web), 2, 2) == read(make_shards([40, 30]), 0, 1)


# Counts that are written down


@pytest.fixture
def lazy(make_shards: Any, tmp_path: Path) -> tuple[list[str], Data]:
    paths = make_shards([3, 2, 4])
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({"00000.tar": 3, "00001.tar": 2, "00002.tar": 4, "another.tar": 9}))
    return paths, Data(sizes=str(sizes))


def test_a_run_starts_before_its_shards_are_indexed(lazy: tuple[list[str], Data]) -> None:
    paths, data = lazy
    watched = Watched()
    source = ShardSource(paths, data, watched)
    assert set(watched.opens) == {"sizes.json"}, "no shard was opened"
    assert source.counts == [3, 2, 4]
    first = source.fingerprint
    assert source.sample(4).key == "00001.tar/000004"
    assert sorted(path.name for path in Path(paths[0]).parent.glob("*.index")) == ["00001.tar.index"]
    assert ShardSource(paths, data).fingerprint == first, "it does not tell what has been indexed by now"
    assert everything(source) == everything(ShardSource(paths, Data()))
    assert ShardSource(paths, Data()).fingerprint != first
    assert ShardSource(paths, data, field="data.eval").fingerprint == ShardSource(paths, Data()).fingerprint


def test_a_wrong_count_is_an_error_that_names_the_file(lazy: tuple[list[str], Data]) -> None:
    paths, data = lazy
    assert data.sizes is not None
    Path(data.sizes).write_text('{"00000.tar": 3, "00001.tar": 5, "00002.tar": 4}')
    source = ShardSource(paths, data)
    assert source.sample(0)
    with pytest.raises(UserError, match=r"data\.sizes .*sizes\.json: 00001\.tar has 2 samples, not 5") as caught:
        source.sample(3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"00000.tar": 3}', r"no count for 2 shards \(.*00001\.tar, .*00002\.tar\)"),
        ("[3, 2, 4]", "is a list"),
        ("{", "is no JSON"),
        ('{"00000.tar": -1}', "has -1 samples"),
        ('{"00000.tar": "3"}', "has '3' samples"),
        ('{"00000.tar": true}', "has True samples"),
    ],
)
def test_files_of_counts_that_do_not_fit(lazy: tuple[list[str], Data], text: str, says: str) -> None:
    paths, data = lazy
    assert data.sizes is not None
    Path(data.sizes).write_text(text)
    with pytest.raises(UserError, match=rf"data\.sizes .*sizes\.json: .*{says}"):
        ShardSource(paths, data)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        ShardSource(paths, Data(sizes="nowhere.json"))


def test_damage_found_late_is_logged(lazy: tuple[list[str], Data], caplog: pytest.LogCaptureFixture) -> None:
    paths, data = lazy
    raw = Path(paths[2]).read_bytes()
    Path(paths[2]).write_bytes(raw.rstrip(b"\0") + bytes(-len(raw.rstrip(b"\0")) % 512))
    source = ShardSource(paths, data)
    assert source.damage == ()
    source.sample(7)
    assert [line.getMessage().partition(": ")[2] for line in caplog.records] == [
        f"{ShardSource(paths, Data()).damage[0].reason} (1 notes)"
    ]


def test_a_shard_that_changes_before_it_is_first_read(lazy: tuple[list[str], Data]) -> None:
    paths, data = lazy
    source = ShardSource(paths, data)
    os.utime(paths[2], ns=(1, 1))
    with pytest.raises(UserError, match=r"00002\.tar: changed while it was in use"):
        source.sample(8)


# Tables beside shards


@pytest.fixture
def tabled(make_shards: Any) -> list[str]:
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = make_shards([3, 2])
    for path, keys in zip(paths, (["000002", "000000", "nobody"], ["000003", "000004"]), strict=True):
        table = pyarrow.table(
            {
                "key": keys,
                "alt": [None if key == "000003" else f" alt of {key} " for key in keys],
                "many": [[f"{key} one", f"{key} two"] for key in keys],
                "label": [90 + n for n in range(len(keys))],
                "similarity": [0.25] * len(keys),
            }
        )
        tables.write_table(table, path.replace(".tar", ".parquet"))
    return paths


def test_captions_and_scalars_of_a_table(tabled: list[str]) -> None:
    source = ShardSource(tabled, Data(text_keys=("parquet:many", "txt", "parquet:alt")))
    first, second, _, fourth, _ = everything(source)
    assert first.texts == {
        "parquet:many": ["000000 one", "000000 two"], "txt": ["caption 0 first"], "parquet:alt": ["alt of 000000"]
    }  # fmt: skip
    assert list(first.texts) == ["parquet:many", "txt", "parquet:alt"]
    assert (first.meta["similarity"], first.meta["label"]) == (0.25, 0), "the json member wins"
    assert second.texts == {"txt": ["caption 1 first"]}, "no row, no caption of it"
    assert "similarity" not in second.meta
    assert list(fourth.texts) == ["parquet:many", "txt"], "an empty cell is none"
    assert "many" not in first.meta


def test_a_table_is_read_only_where_it_is_asked_for(tabled: list[str]) -> None:
    watched = Watched()
    plain = ShardSource(tabled, Data(), watched)
    assert "similarity" not in everything(plain)[0].meta
    assert not [name for name in watched.stats if name.endswith(".parquet")]
    columns = ShardSource(tabled, Data(), watched, meta_columns=("similarity", "never"))
    meta = everything(columns)[0].meta
    assert (meta["similarity"], "alt" in meta, "never" in meta) == (0.25, False, False)
    assert watched.opens["00000.parquet"] == 2, "its end for the fingerprint, and all of it once"
    os.unlink(tabled[0].replace(".tar", ".parquet"))
    assert "similarity" not in ShardSource(tabled, Data(), meta_columns=("similarity",)).sample(0).meta


def test_tables_that_do_not_fit(tabled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Path(tabled[0].replace(".tar", ".parquet"))
    with pytest.raises(UserError, match=r"00000\.parquet has no column 'none', only key, alt"):
        ShardSource(tabled, Data(text_keys=("parquet:none",))).sample(0)
    before = ShardSource(tabled, Data(text_keys=("parquet:alt",))).fingerprint
    assert before != ShardSource(tabled, Data()).fingerprint
    beside.write_bytes(Path(tabled[1].replace(".tar", ".parquet")).read_bytes())
    assert ShardSource(tabled, Data(text_keys=("parquet:alt",))).fingerprint != before
    beside.write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match=r"00000\.parquet: is no good parquet file"):
        ShardSource(tabled, Data(text_keys=("parquet:alt",))).sample(0)
    beside.unlink()
    with pytest.raises(UserError, match=r"parquet:alt: .*00000\.parquet is missing"):
        ShardSource(tabled, Data(text_keys=("parquet:alt",)))
    monkeypatch.setattr(parquet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pretrain\[table\]'"):
        ShardSource(tabled, Data(text_keys=("parquet:alt",)))
    with pytest.raises(UserError, match=r"tables beside data\.train: .*pip install 'pretrain\[table\]'"):
        ShardSource(tabled, Data(), meta_columns=("label",))
    assert ShardSource(tabled[:1], Data(), meta_columns=("label",)).sample(0).meta["label"] == 0, "no table, no need"


# Making many indexes


def opened(paths: list[str], data: Data | None = None, start: int = 0) -> list[shards.Shard]:
    data = data or Data()
    return indexing.open_shards(paths, data, storage.make(data), start)


def test_processes_make_the_same_indexes(make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_shards([5, 3, 4, 2])
    alone = opened(paths, Data(index_dir=str(tmp_path / "one")))
    monkeypatch.setattr(indexing, "_HELPED", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    asked = list[str]()
    real = Helpers.index
    monkeypatch.setattr(Helpers, "index", lambda self, name: asked.append(name) or real(self, name))
    helped = opened(paths, Data(index_dir=str(tmp_path / "two")))
    assert sorted(asked) == paths
    assert [replace(shard, index_path="") for shard in helped] == [replace(shard, index_path="") for shard in alone]
    for one, two in zip(alone, helped, strict=True):
        assert Path(one.index_path).read_bytes() == Path(two.index_path).read_bytes()
    asked.clear()
    Path(helped[1].index_path).unlink()
    Path(helped[2].index_path).unlink()
    assert opened(paths, Data(index_dir=str(tmp_path / "two")), start=2) == helped
    assert asked == [paths[2], paths[1]], "what is there is kept, and ranks begin in different places"


def test_what_fails_in_a_process_is_told_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with Helpers(1, None) as helpers:
        with pytest.raises(UserError, match=r"a\.tar: is compressed"):
            helpers.index(str(tmp_path / "a.tar"))
        with pytest.raises(UserError, match=r"b\.tar: there is no such file"):
            helpers.index(str(tmp_path / "b.tar"))
        with pytest.raises(IsADirectoryError):
            helpers.index(str(tmp_path))
        helpers._all[0].kill()
        with pytest.raises(RuntimeError, match=r"was killed by signal 9 .* at .*a\.tar"):
            helpers.index(str(tmp_path / "a.tar"))
    assert helpers._all[0].poll() == -9


def test_a_bad_shard_among_many_ends_the_work_and_keeps_what_is_done(make_shards: Any) -> None:
    paths = make_shards([2, 2, 2])
    Path(paths[1]).write_bytes(b"<html>" * 200)
    with pytest.raises(UserError, match=r"00001\.tar: has no tar header"):
        opened(paths)
    Path(paths[1]).unlink()
    assert [shard.samples for shard in opened([paths[0], paths[2]])] == [2, 2]


def test_progress_is_silent_at_first(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(indexing.time, "monotonic", lambda: now[0])
    meter, mute = indexing.Progress(4, speaks=True), indexing.Progress(4, speaks=False)
    for seconds in (1.0, 1.5, 0.5, 7.0):
        now[0] += seconds
        meter.add()
        mute.add()
    meter.finish()
    mute.finish()
    assert capsys.readouterr().err.splitlines() == [
        "indexing shards: 2 of 4 in 2 s, 2 s left",
        "indexing shards: 4 of 4 in 10 s, 0 s left",
        "indexing shards: 4 of 4 in 10 s, 0 s left",
    ]


def test_as_many_suffixes_as_members(tmp_path: Path) -> None:
    """Names with a number behind a dot, as no one should write them: all are members of one sample."""
    info = tarfile.TarInfo("photo.000000.x")
    template = info.tobuf(tarfile.USTAR_FORMAT)
    blank = sum(template[:148]) + 8 * 32 + sum(template[156:]) - 6 * ord("0")
    with (tmp_path / "a.tar").open("wb") as file:
        for n in range(70_000):
            digits = b"%06d" % n
            file.write(template[:6] + digits + template[12:148] + b"%06o\0 " % (blank + sum(digits)) + template[156:])
        file.write(bytes(1024))
    index = indexing.build(str(tmp_path / "a.tar"), "unused", storage.make(Data()))[1]
    assert list(itertools.islice(index.members(0), 2)) == ["000000.x", "000001.x"]
    assert list(index.members(0))[-1] == "069999.x"


# What has changed


def test_differences_name_the_shards() -> None:
    before = [Fact("a", 1, 2, "x", 0), Fact("b", 1, 2, "y", 0), Fact("a", 5, 6, "z", 1)]
    assert differences(before, list(before)) == []
    assert differences(before, [before[0], before[2]]) == ["shard b is missing (2 samples)"]
    assert differences(before[:1], before[:2]) == ["shard b is new (2 samples)"]
    assert differences(before, [before[0], Fact("b", 3, 2, "w", 0), before[2]]) == [
        "shard b was replaced since the run began (size 1 -> 3)"
    ]
    assert differences(before, [*before[:2], Fact("a", 5, 6, "w", 1)]) == [
        "shard a was replaced since the run began (other content of the same size)"
    ]
    assert differences(before[:2], [before[1], before[0]]) == [
        "the order of the shards has changed, from a on, where b is"
    ]
    assert differences(before[:2], [before[0], before[1]._replace(entry=1)]) == [
        "the shards are grouped into other entries"
    ]
    assert summary(["1", "2", "3"]) == "1; 2; 3"
    assert summary(["1", "2", "3", "4", "5"]) == "1; 2; 3; and 2 more"


def test_what_a_run_keeps_of_its_shards(make_shards: Any) -> None:
    source = ShardSource(make_shards([2, 1]), Data())
    text = fingerprint.dump(source.facts)
    assert fingerprint.parse(text) == source.facts
    assert json.loads(text)["fingerprint"] == source.fingerprint == fingerprint.fingerprint(source.shards)
    assert len(text.splitlines()) == 4
    for other in ("", "[]", "{}", '{"shards": [{"name": "a"}]}'):
        with pytest.raises(UserError):
            fingerprint.parse(other)


def test_data_json_is_of_the_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, other = [Fact("a", 1, 2, "x", 0)], [Fact("a", 2, 2, "y", 0)]
    assert record.data_changes(tmp_path, first) == ""
    assert "cannot tell which shards have changed" in caplog.text
    record.keep_data(tmp_path, first, fresh=False)
    record.keep_data(tmp_path, other, fresh=False)
    assert record.data_changes(tmp_path, first) == ""
    assert record.data_changes(tmp_path, other) == "shard a was replaced since the run began (size 1 -> 2)"
    record.keep_data(tmp_path, other, fresh=True)
    assert record.data_changes(tmp_path, other) == ""


def test_shards_of_webdatasets_own_writer(tmp_path: Path, picture_bytes: Any) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "w-%02d.tar"), maxcount=3, verbose=0) as writer:
        for n in range(5):
            writer.write({"__key__": f"k{n}", "png": picture_bytes(n), "txt": f"caption {n}", "json": {"label": n}})
    source = ShardSource(sorted(map(str, tmp_path.glob("*.tar"))), Data())
    assert (source.counts, source.damage) == ([3, 2], ())
    found = everything(source)
    assert [(raw.image_bytes, raw.captions, raw.meta) for raw in found] == [
        (picture_bytes(n), [f"caption {n}"], {"label": n}) for n in range(5)
    ]


def test_what_mixes_the_samples_is_part_of_the_fingerprint(make_shards: Any) -> None:
    """data.train may change at a resume, and a file of weights may too: where that changes the order, it is refused."""
    a, b, c = make_shards([3, 3, 3])

    def mixed(*groups: tuple[list[str], float | None]) -> str:
        return ShardSource([Entry(paths, weight) for paths, weight in groups], Data()).fingerprint

    plain = mixed(([a, b, c], None))
    assert mixed(([a], None), ([b, c], None)) == plain, "one data set, however it is written down"
    weighted = {
        mixed(([a], 0.5), ([b, c], 0.5)),
        mixed(([a, b], 0.5), ([c], 0.5)),
        mixed(([a], 0.6), ([b, c], 0.4)),
        plain,
    }
    assert len(weighted) == 4
    assert mixed(([a], 3.0), ([b, c], 2.0)) in weighted, "the shares count, not their unit"
