"""Batches on the device: this rank's rows of every global batch, from any sample on."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType

import torch

from pretrain.config import Data, Run
from pretrain.data import left_out, order, patterns, storage
from pretrain.data.digest import batch_digest, combine, row_digests
from pretrain.data.evaluation import EvalBatch, EvalLoader, eval_loader
from pretrain.data.images.transforms import ImageSpec
from pretrain.data.left_out import Stretch
from pretrain.data.rows import Part, Tokenize, TrainRows
from pretrain.data.shards.reader import ShardSource, Source
from pretrain.data.shuffle import quality
from pretrain.data.slab import Columns
from pretrain.data.stages import Work
from pretrain.data.stream import Made, stream
from pretrain.data.synthetic import SyntheticSource
from pretrain.data.wanted import Wanted
from pretrain.errors import UserError
from pretrain.values import Batch, Skip
from pretrain.world import World

log = logging.getLogger(__name__)

__all__ = [
    "BadRate", "EvalBatch", "EvalLoader", "Loader", "batch_digest", "combine", "eval_loader", "row_digests",
    "train_loader", "train_source",
]  # fmt: skip


def train_source(data: Data, world: World, spec: ImageSpec, wanted: Wanted | None = None) -> Source:
    """The training data set; `len` of it is an epoch.

    Args:
        wanted: whose metadata fields may be columns of tables beside the shards.

    Raises:
        UserError: data.train names nothing, or a shard is no good tar.
    """
    if data.synthetic is not None:
        return SyntheticSource(data.synthetic, spec.size)
    store = storage.make(data)
    entries = patterns.entries(data.train, store, "data.train")
    start = world.rank * sum(len(entry.paths) for entry in entries) // world.size
    fields = [field.name for field in wanted.fields] if wanted else []
    return ShardSource(entries, data, store, start, meta_columns=fields)


def train_loader(
    run: Run,
    world: World,
    spec: ImageSpec,
    tokenize: Tokenize,
    start_sample: int,
    stop_sample: int,
    source: Source | None = None,
    wanted: Wanted | None = None,
    without: Sequence[Stretch] = (),
) -> Loader:
    """This rank's part of the global batches that lie between two positions of the run's sample stream.

    Args:
        tokenize: texts to [B, L] int64; if it has `truncated(texts, tokens)`, cut captions are counted.
        start_sample: samples that the run has consumed. It is fixed here: there is no state to load later.
        stop_sample: samples at which it ends; a last piece smaller than a global batch is left out.
        source: from `train_source`, where the caller has needed its length before.
        wanted: columns beside the pair, for `Batch.extra`.
        without: stretches of the data order, of whole global batches, that the run leaves out; its samples are counted
            without them.

    Raises:
        UserError: data.train names nothing, a shard is no good tar, or the batch does not divide over the ranks.
    """
    if run.train.global_batch % world.size:
        raise UserError(f"train.global_batch {run.train.global_batch} is not a multiple of {world.size} ranks")
    wanted = wanted or Wanted()
    source = source or train_source(run.data, world, spec, wanted)
    samples = order.of(source, run.seed, run.data)
    if world.is_main and isinstance(source, ShardSource):
        _tell(source, samples, run)
    rows = TrainRows(source, samples, run.data, spec, tokenize, wanted)
    return Loader(rows, run, world, start_sample, stop_sample, without)


def _tell(source: ShardSource, samples: order.SampleOrder, run: Run) -> None:
    """What is trained on, how well it is mixed, and whether a cache can follow."""
    found = f"data: {len(source):,} samples in {len(source.shards):,} shards"
    log.info("%s%s", found, f"; {quality(samples, source, run.train.global_batch)}" if run.data.shuffle_window else "")
    away = sum(shard.size for shard in source.shards if not storage.is_local(shard.path)) / 2**30
    if run.data.cache_dir and run.data.shuffle_window and run.data.shuffle_chunk != 0 and away > run.data.cache_gb:
        log.warning(
            "data.cache_gb %g: the remote shards take %.0f GiB, and the order reads from all of them at a time: "
            "they would be fetched again and again; set data.shuffle_chunk 0 in a new run, or leave data.cache_dir out",
            run.data.cache_gb,
            away,
        )


class Loader:
    """Iterates over this rank's `Batch`es, once. A context manager: leaving it ends the workers."""

    def __init__(
        self, rows: TrainRows, run: Run, world: World, start: int, stop: int, without: Sequence[Stretch] = ()
    ) -> None:
        self.samples_per_epoch, self.fingerprint = len(rows.source), rows.source.fingerprint
        self.workers = run.data.workers
        self.ahead = run.data.prefetch if run.data.workers else 0
        """Batches that may lie ready."""
        self.wait_s = 0.0
        """Seconds that the consumer has waited for rows, in all."""
        self.work = Work()
        """What the batches handed out so far have cost this rank's workers, and the captions cut in them."""
        self._device, self._bad = world.device, BadRate(run.data.max_bad)
        batch = run.train.global_batch
        starts = range(start, stop - batch + 1, batch)
        self._shares = _Shares(starts, world.rank, batch // world.size, without)
        self._batches = self._iterate(stream(rows, self._shares, run.data, world.device, world.rank))

    def __len__(self) -> int:
        """Batches of the whole iteration."""
        return len(self._shares)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Iteration is over."""
        self._batches.close()

    def _iterate(self, made: Generator[Made[Part], None, None]) -> Generator[Batch, None, None]:
        batches = _one_ahead(made, self._device) if self._device.type == "cuda" else made
        try:
            while True:
                since = time.perf_counter()
                found = next(batches, None)
                self.wait_s += time.perf_counter() - since
                if found is None:
                    return
                batch = _batch(found)
                self.work.add(found.work)
                self.work.samples += len(batch)
                self.work.truncated += sum(part.truncated for part in found.notes)
                self._bad.add(len(batch), batch.skips)
                yield batch
        finally:
            made.close()


class _Shares(Sequence[range]):
    """This rank's positions of each global batch."""

    def __init__(self, starts: range, rank: int, rows: int, without: Sequence[Stretch]) -> None:
        self._starts, self._first, self._rows, self._without = starts, rank * rows, rows, without

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, batch: int) -> range:  # type: ignore[override]
        start = left_out.position(self._starts[batch], self._without) + self._first
        return range(start, start + self._rows)


_NUMBERS = re.compile(r"(?<![\w-])\d+")
"""Reasons that differ in numbers alone (sizes, offsets) count as one."""


class BadRate:
    """Stops a run whose data set is broken, by the share of samples that had to be replaced.

    Raises:
        UserError: from `add`: at least 10, and more than `max_bad`, of the last 10,000 samples, or of as many as there
            were since this start, once they are 1,000.
    """

    window, enough, least, told = 10_000, 1_000, 10, 3

    def __init__(self, max_bad: float) -> None:
        self._max_bad, self._seen = max_bad, 0
        self._bad = deque[tuple[int, Skip]]()

    def add(self, samples: int, skips: Sequence[Skip]) -> None:
        """Count `samples` more, for which `skips` were passed over."""
        self._seen += samples
        self._bad.extend((self._seen, skip) for skip in skips)
        while self._bad and self._bad[0][0] <= self._seen - self.window:
            self._bad.popleft()
        looked_at = min(self._seen, self.window)
        if len(self._bad) >= self.least and len(self._bad) > self._max_bad * max(looked_at, self.enough):
            raise UserError(
                f"data.max_bad {self._max_bad}: {len(self._bad)} of the last {looked_at} samples could not be used; "
                f"{self._summary()}; repair the shards or raise it"
            )

    def _summary(self) -> str:
        last = self._bad[-1][1]
        example: dict[str, str] = {}
        for _, skip in self._bad:
            example.setdefault(_NUMBERS.sub("#", skip.reason), skip.reason)
        shards = self._most(skip.shard for _, skip in self._bad)
        reasons = self._most(example[_NUMBERS.sub("#", skip.reason)] for _, skip in self._bad)
        return f"by shard: {shards}; by reason: {reasons}; the last: {last.shard}/{last.key}"

    def _most(self, names: Iterator[str]) -> str:
        """The most frequent names with their counts, equal counts in the order of the names."""
        counts = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))
        rest = len(counts) - self.told
        listed = ", ".join(f"{name} ({count})" for name, count in counts[: self.told])
        return f"{listed} and {rest} more" if rest > 0 else listed


def _batch(made: Made[Part]) -> Batch:
    columns: Columns = dict(made.columns)
    images, texts, ids = (columns.pop(name) for name in ("images", "texts", "ids"))
    keys = tuple(key for part in made.notes for key in part.keys)
    return Batch(images, texts, ids, keys, tuple(skip for part in made.notes for skip in part.skips), columns)


def _one_ahead(batches: Iterator[Made[Part]], device: torch.device) -> Iterator[Made[Part]]:
    """The same batches, the next one always being copied on a stream of its own while this one is computed on."""
    side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def load() -> Made[Part] | None:
        with torch.cuda.stream(side):
            return next(batches, None)

    ready = load()
    while ready is not None:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(side)
        for tensor in ready.columns.values():
            tensor.record_stream(computing)
        batch, ready = ready, load()
        yield batch
