"""`pretrain index --check`: shards read again, compared with their indexes, and what they hold told in figures."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import Data
from pretrain.data import storage
from pretrain.data.checking.scanning import Scan, Scanned, Tally, Task
from pretrain.data.patterns import expand
from pretrain.data.processes import Tick, cores, spread
from pretrain.data.progress import Meter
from pretrain.data.shards.facts import Shard, index_path, load
from pretrain.data.shards.fingerprint import fingerprint
from pretrain.data.shards.index import known
from pretrain.data.shards.indexing import build
from pretrain.errors import UserError

_SEED = 20_241
_MAX_HASHES = 4_000_000
_MAX_SIZES = 200_000
_SHOWN = 24
_EXAMPLES = 5


@dataclass(frozen=True)
class CheckReport:
    """What `pretrain index --check` found."""

    shards: int
    samples: int
    bytes: int
    unindexed: int
    """Shards without an index that fits; a run makes those that are missing."""
    fingerprint: str
    suffix_sets: dict[str, int]
    """Members that samples have together -> samples."""
    missing_numbers: tuple[str, ...]
    """Gaps in the numbers of the shards, a line for each run of names."""
    split_samples: int
    """Samples whose members are not neighbours, which other readers take for two."""
    captions: dict[str, Any]
    images: dict[str, Any]
    repeated_keys: dict[str, Any]
    """Keys that several shards have."""
    problems: tuple[str, ...]
    """What is wrong with shards, one line each, with the shard's name; empty: all is well."""


@dataclass(frozen=True)
class Found:
    """All that a page shows."""

    report: CheckReport
    tally: Tally


def check(
    patterns: Sequence[str],
    data: Data | None = None,
    *,
    report: Path | None = None,
    decode: int = 256,
    workers: int = 0,
) -> CheckReport:
    """Read shards through; nothing is written but the page.

    Args:
        patterns: paths, URLs, globs and brace patterns.
        data: image_keys and text_keys, and how shards are reached.
        report: write a page with histograms and pictures there.
        decode: images that are decoded, drawn from all samples by a fixed seed.
        workers: processes; 0: one for each core.

    Raises:
        UserError: a pattern names nothing, a shard is no tar, or the page cannot be written.
    """
    if decode < 0 or workers < 0:
        raise UserError(f"decode {decode} and workers {workers} must be at least 0")
    data = data or Data()
    names = expand(patterns, "shards", storage.make(data))
    workers = min(workers or cores(), len(names))
    shards, problems = _verified(names, data, workers)
    found = _scanned(shards, problems, data, workers, decode, _SHOWN if report else 0)
    if report is not None:
        _write(report, found)
    return found.report


def _scanned(
    shards: list[tuple[Shard, bool]], problems: list[str], data: Data, workers: int, decode: int, shown: int
) -> Found:
    total = sum(shard.samples for shard, _ in shards)
    scan = Scan(data, thin=1 + total // _MAX_HASHES, every=1 + total // _MAX_SIZES)
    meter = Meter("check", total)
    try:
        tasks = _tasks(shards, total, decode, shown)
        scanned = sorted(spread(scan, tasks, workers, meter.add), key=lambda found: found.turn)
    finally:
        meter.close()
    tally = Tally()
    for one in scanned:
        tally += one.tally
    return Found(_report(shards, tally, scanned, scan, problems), tally)


@dataclass(frozen=True)
class Verify:
    """Builds a shard's index again and compares it with the stored one. Travels to worker processes."""

    data: Data

    def __call__(self, task: tuple[int, str], tick: Tick) -> tuple[int, Shard | None, bool, list[str]]:
        turn, name = task
        store = storage.make(self.data)
        stat = store.stat(name)
        try:
            shard, _ = build(name, index_path(name, stat, self.data), store, stat)
        except UserError as error:  # no tar: told with all else that is wrong
            return turn, None, False, [str(error)]
        before = known(name, self.data, store)
        return turn, shard, before == shard, list(_problems(shard, before))


def _problems(shard: Shard, stored: Shard | None) -> Iterator[str]:
    if stored is not None and stored != shard:
        yield f"{shard.path}: differs from its index, though size and time are the same"
    for reason, key in zip(shard.damage, shard.damage_keys, strict=True):
        yield f"{shard.path}: {reason}" + (f" (sample {key!r})" if key and key not in reason else "")
    if not shard.samples and not shard.damage:
        yield f"{shard.path}: holds no samples"


def _verified(names: list[str], data: Data, workers: int) -> tuple[list[tuple[Shard, bool]], list[str]]:
    """Each shard as it is now and whether its index says so; what is wrong, a line each."""
    found = sorted(spread(Verify(data), enumerate(names), workers, lambda *_: None), key=lambda item: item[0])
    shards = [(shard, same) for _, shard, same, _ in found if shard is not None]
    if not shards:
        raise UserError(f"shards: none can be read: {found[0][3][0]}")
    return shards, [line for *_, lines in found for line in lines]


def _tasks(shards: list[tuple[Shard, bool]], total: int, decode: int, shown: int) -> Iterator[Task]:
    rng, start = random.Random(_SEED), 0
    chosen = [sorted(rng.sample(range(total), min(total, count))) for count in (decode, shown)]
    for turn, (shard, same) in enumerate(shards):
        ends = [np.searchsorted(numbers, [start, start + shard.samples]) for numbers in chosen]
        own = [frozenset(n - start for n in part[i:j]) for part, (i, j) in zip(chosen, ends, strict=True)]
        yield Task(turn, shard, same, own[0], own[1])
        start += shard.samples


def _report(
    shards: list[tuple[Shard, bool]], tally: Tally, scanned: list[Scanned], scan: Scan, problems: list[str]
) -> CheckReport:
    every = [shard for shard, _ in shards]
    return CheckReport(
        shards=len(every),
        samples=tally.samples,
        bytes=sum(shard.size for shard in every),
        unindexed=sum(not same for _, same in shards),
        fingerprint=fingerprint(every),
        suffix_sets=dict(tally.suffixes.most_common()),
        missing_numbers=tuple(missing_numbers([shard.path for shard in every])),
        split_samples=tally.split,
        captions=_caption_facts(tally, np.concatenate([one.texts for one in scanned]), scan.thin),
        images=_image_facts(tally, scan.every),
        repeated_keys=_repeated(shards, scanned, scan.thin),
        problems=tuple(problems),
    )


def _caption_facts(tally: Tally, hashes: np.ndarray, thin: int) -> dict[str, Any]:
    distinct = len(np.unique(hashes))
    unreadable = {f"unreadable: {why}": times for why, times in tally.bad_texts.most_common(_EXAMPLES)}
    return {
        "count": tally.captions,
        "samples without": tally.uncaptioned,
        **unreadable,
        "repeated share": 1 - distinct / len(hashes) if len(hashes) else 0.0,
        **({"repeated share is of one in": thin} if thin > 1 else {}),
        "words": spread_of(tally.words),
        "characters": spread_of(tally.characters),
    }


def _image_facts(tally: Tally, every: int) -> dict[str, Any]:
    return {
        "samples without": tally.imageless,
        "headers read": tally.sized,
        **({"headers read are one in": every} if every > 1 else {}),
        "formats": dict(tally.formats.most_common()),
        "width": spread_of(tally.widths),
        "height": spread_of(tally.heights),
        "megapixels": {key: value / 100 for key, value in spread_of(tally.pixels).items()},
        "mean KB": tally.image_bytes / tally.sized / 1e3 if tally.sized else 0.0,
        "decoded": tally.decoded,
        "undecodable": len(tally.undecodable),
        "undecodable first": tuple(f"{name}: {why}" for name, why in tally.undecodable[:_EXAMPLES]),
    }


def spread_of(counts: Counter[int]) -> dict[str, float]:
    """Smallest, mean, quantiles and largest of value -> times; empty where there is nothing."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    times = np.cumsum([counts[int(value)] for value in values])
    low, middle, high = (int(values[np.searchsorted(times, share * times[-1])]) for share in (0.05, 0.5, 0.95))
    mean = float(sum(value * count for value, count in counts.items()) / int(times[-1]))
    ends = int(values[0]), int(values[-1])
    return {"least": ends[0], "5%": low, "median": middle, "mean": mean, "95%": high, "most": ends[1]}


def _repeated(shards: list[tuple[Shard, bool]], scanned: list[Scanned], thin: int) -> dict[str, Any]:
    """Keys that occur in several shards: how many, and a few by name."""
    hashes = np.concatenate([one.keys for one in scanned])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    where = np.repeat(np.arange(len(scanned)), [len(one.keys) for one in scanned])
    places = np.concatenate([one.places for one in scanned])
    few = [int(order[n + 1]) for n in same[:_EXAMPLES]]
    first = tuple(
        f"{shard.name}/{load(shard).name(int(places[n]))}"
        for n, (shard, indexed) in ((n, shards[int(where[n])]) for n in few)
        if indexed
    )
    return {"count": len(same) * thin, **({"estimated from one in": thin} if thin > 1 else {}), "first": first}


def missing_numbers(paths: Iterable[str]) -> Iterator[str]:
    """Gaps in '.../name-00012.tar', a line for each folder and name. Gaps are normal with img2dataset."""
    runs: dict[tuple[str, str], dict[int, int]] = {}
    for path in paths:
        found = re.fullmatch(r"(.*?)(\d+)(?:-\d\d)?(\.[^./]+)", path)
        if found:
            runs.setdefault((found[1], found[3]), {})[int(found[2])] = len(found[2])
    for (before, after), numbers in runs.items():
        ordered = sorted(numbers)
        gaps = [(a + 1, b - 1) for a, b in itertools.pairwise(ordered) if b - a > 1]
        if gaps:
            width = min(numbers.values())
            names = [f"{a:0{width}d}" if a == b else f"{a:0{width}d}..{b:0{width}d}" for a, b in gaps[:_EXAMPLES]]
            more = ", ..." if len(gaps) > _EXAMPLES else ""
            yield f"{sum(b - a + 1 for a, b in gaps)} numbers of {before}*{after}: {', '.join(names)}{more}"


def _write(path: Path, found: Found) -> None:
    from pretrain.data.checking.inspect_page import page

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page(asdict(found.report), found.tally).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"report {path}: cannot be written ({error.strerror}); name another file") from None
