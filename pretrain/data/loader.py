"""Batches on the device: this rank's rows of every global batch, from any sample on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain.config import Data, Run
from pretrain.data.digest import batch_digest, combine, row_digests
from pretrain.data.evaluation import EvalBatch, EvalLoader, eval_loader
from pretrain.data.order import Order
from pretrain.data.patterns import expand
from pretrain.data.reader import ShardSource, Source
from pretrain.data.rows import Part, Tokenize, TrainParts
from pretrain.data.synthetic import SyntheticSource
from pretrain.data.transforms import ImageSpec
from pretrain.data.workers import worker_loader
from pretrain.errors import UserError
from pretrain.values import Batch, Skip
from pretrain.world import World

__all__ = [
    "BadRate", "EvalBatch", "EvalLoader", "Loader", "batch_digest", "combine", "eval_loader", "row_digests",
    "train_loader", "train_source",
]  # fmt: skip


def train_source(data: Data, world: World, spec: ImageSpec) -> Source:
    """The training data set; `len` of it is an epoch.

    Raises:
        UserError: data.train names nothing, or a shard is no good tar.
    """
    if data.source == "synthetic":
        return SyntheticSource(data.synthetic_samples, spec.size)
    paths = expand(data.train, "data.train")
    return ShardSource(paths, data, start=world.rank * len(paths) // world.size)


def train_loader(
    run: Run,
    world: World,
    spec: ImageSpec,
    tokenize: Tokenize,
    start_sample: int,
    stop_sample: int,
    source: Source | None = None,
) -> Loader:
    """This rank's part of the global batches that lie between two positions of the run's sample stream.

    Args:
        tokenize: texts to [B, L] int64; if it has `truncated(texts, tokens)`, cut captions are counted.
        start_sample: samples that the run has consumed.
        stop_sample: samples at which it ends; a last piece smaller than a global batch is left out.
        source: from `train_source`, where the caller has needed its length before.

    Raises:
        UserError: data.train names nothing, a shard is no good tar, or the batch does not divide over the ranks.
    """
    if run.train.global_batch % world.size:
        raise UserError(f"train.global_batch {run.train.global_batch} is not a multiple of {world.size} ranks")
    source = source or train_source(run.data, world, spec)
    order = Order(source.counts, run.seed, run.data.shuffle, run.data.shuffle_window)
    parts = TrainParts(source, order, run.data, spec, tokenize)
    return Loader(parts, run, world, start_sample, stop_sample)


class Loader:
    """Iterates over this rank's `Batch`es, once. A context manager: leaving it ends the workers.

    All workers build parts of the same batch, so that the first one comes soon and `data.prefetch` batches are ready,
    not one set for each worker.
    """

    def __init__(self, parts: TrainParts, run: Run, world: World, start: int, stop: int) -> None:
        self.samples_per_epoch, self.fingerprint = len(parts.source), parts.source.fingerprint
        self.wait_s = 0.0
        """Seconds that the consumer has waited for rows, in all."""
        self.truncated = 0
        """Captions of this rank that did not fit the context length, in all."""
        self._device, self._bad = world.device, BadRate(run.data.max_bad)
        batch = run.train.global_batch
        self._share = batch // world.size
        self._starts = range(start, stop - batch + 1, batch)
        self._parts = _Positions(self._starts, world.rank * self._share, self._share, max(1, run.data.workers))
        self._batches = self._iterate(worker_loader(parts, self._parts, run.data, world.device))

    def __len__(self) -> int:
        """Batches of the whole iteration."""
        return len(self._starts)

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

    def _iterate(self, parts: DataLoader[Any]) -> Generator[Batch, None, None]:
        batches = self._assemble(parts)
        try:
            yield from _one_ahead(batches, self._device) if self._device.type == "cuda" else batches
        finally:
            batches.close()

    def _assemble(self, loader: DataLoader[Any]) -> Generator[Batch, None, None]:
        parts = iter(loader)
        try:
            for _ in self._starts:
                batch = [self._next(parts) for _ in range(self._parts.per_batch)]
                yield _join(batch, self._device)
        finally:
            _end_workers(parts)

    def _next(self, parts: Iterator[Part | UserError]) -> Part:
        since = time.perf_counter()
        part = next(parts)
        self.wait_s += time.perf_counter() - since
        if isinstance(part, UserError):
            raise part
        self.truncated += part.truncated
        self._bad.add(len(part.ids), part.skips)
        return part


def _end_workers(parts: Iterator[Any]) -> None:
    """At once, not when `parts` is collected: an error's traceback would keep it, and with it workers that heed no
    signal, for which the interpreter waits at its exit."""
    end = getattr(parts, "_shutdown_workers", None)
    if end is not None:
        end()


class _Positions:
    """Ranges of stream positions, a worker's task each, in the order in which they are asked for."""

    def __init__(self, starts: range, first: int, rows: int, pieces: int) -> None:
        self._starts, self._first, self._rows = starts, first, rows
        self._size = -(-rows // pieces)
        self.per_batch = -(-rows // self._size)

    def __len__(self) -> int:
        return len(self._starts) * self.per_batch

    def __iter__(self) -> Iterator[range]:
        for start in self._starts:
            mine = range(start + self._first, start + self._first + self._rows)
            for at in range(0, self._rows, self._size):
                yield mine[at : at + self._size]


class BadRate:
    """Stops a run whose data set is broken, by the share of samples that had to be replaced.

    Raises:
        UserError: from `add`: at least 10, and more than `max_bad`, of the last 10,000 samples.
    """

    window, least = 10_000, 10

    def __init__(self, max_bad: float) -> None:
        self._max_bad, self._seen = max_bad, 0
        self._bad = deque[int]()

    def add(self, samples: int, skips: Sequence[Skip]) -> None:
        """Count `samples` more, for which `skips` were passed over."""
        self._seen += samples
        self._bad.extend([self._seen] * len(skips))
        while self._bad and self._bad[0] <= self._seen - self.window:
            self._bad.popleft()
        if len(self._bad) >= self.least and len(self._bad) > self._max_bad * self.window:
            last = skips[-1]
            raise UserError(
                f"data.max_bad {self._max_bad}: {len(self._bad)} of the last {self.window} samples could not be used "
                f"(the last: {last.shard}/{last.key}: {last.reason}); repair the shards or raise it"
            )


def _join(parts: list[Part], device: torch.device) -> Batch:
    """One batch on the device; the parts are copied before they are joined, because pinned memory is copied faster."""

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.to(device, non_blocking=True) for tensor in tensors])

    images, texts, ids = ([getattr(part, name) for part in parts] for name in ("images", "texts", "ids"))
    keys = tuple(key for part in parts for key in part.keys)
    return Batch(joined(images), joined(texts), joined(ids), keys, tuple(skip for part in parts for skip in part.skips))


def _one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, the next one always being copied on a stream of its own while this one is computed on."""
    side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def load() -> Batch | None:
        with torch.cuda.stream(side):
            return next(batches, None)

    ready = load()
    while ready is not None:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(side)
        for tensor in ready.tensors().values():
            tensor.record_stream(computing)
        batch, ready = ready, load()
        yield batch
