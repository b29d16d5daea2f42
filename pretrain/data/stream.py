"""Batches in order, their rows made by workers, in place: what the training and the evaluation loader share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from pretrain.config import Data
from pretrain.data.read_ahead import ReadAhead
from pretrain.data.shards.reader import RawSample
from pretrain.data.slab import Columns, Layout, Slab, fresh
from pretrain.data.stages import Stages, Work
from pretrain.data.workers import PATIENCE_S, Note, Task, Workers

Notes = TypeVar("Notes")
"""What comes of some rows beside their columns: small, and travels through a pipe."""
Notes_co = TypeVar("Notes_co", covariant=True)
Take = Callable[[int, int], RawSample]
"""(place, sample number) -> the sample, perhaps read before."""


class Maker(Protocol[Notes_co]):
    """Makes rows of batches. A pure function of the place, so that no number of workers shows."""

    layout: Layout

    def number(self, place: int) -> int:
        """The sample that is read first for a place."""
        ...

    def read(self, number: int) -> RawSample:
        """A sample's bytes; several threads may ask at once. Raises: BadSample, UserError, OSError."""
        ...

    def make(self, places: Sequence[int], out: Columns, take: Take, stages: Stages) -> Notes_co:
        """Write a row for each place into `out`, whose columns have as many rows."""
        ...


class Made(NamedTuple, Generic[Notes]):
    """A batch."""

    columns: Columns
    """On the device, and the reader's own."""
    notes: list[Notes]
    """Of its consecutive parts."""
    work: Work
    """What it cost the workers."""


@dataclass(frozen=True)
class Tasks:
    """Batches cut into pieces of `size` rows, so that all workers build parts of the same batch and it comes soon.

    Task t is piece t % pieces of batch t // pieces; a short batch may leave pieces empty.
    """

    batches: Sequence[range]
    rows: int
    """Of the largest batch."""
    workers: int

    @property
    def size(self) -> int:
        return -(-self.rows // max(1, self.workers))

    @property
    def pieces(self) -> int:
        return -(-self.rows // self.size)

    def of(self, batch: int) -> range:
        return range(batch * self.pieces, (batch + 1) * self.pieces)

    def piece(self, task: int) -> tuple[int, int, range]:
        """(batch, first row, places)."""
        batch, piece = divmod(task, self.pieces)
        first = piece * self.size
        places = self.batches[batch][first : first + self.size] if batch < len(self.batches) else range(0)
        return batch, first, places


def stream(
    maker: Maker[Notes], batches: Sequence[range], data: Data, device: torch.device, rank: int
) -> Generator[Made[Notes], None, None]:
    """Every batch of places, in order. Closing the generator ends its workers.

    Raises:
        UserError, OSError: as the maker.
        ProcessDied: a worker was killed, or left.
    """
    if not batches:
        return
    rows = max(map(len, itertools.islice(batches, 0, None, max(1, len(batches) - 1))))  # only the last may be short
    if data.workers:
        yield from _forked(maker, Tasks(batches, rows, data.workers), data, device, rank)
    else:
        yield from _here(maker, batches, device)


def _here(maker: Maker[Notes], batches: Sequence[range], device: torch.device) -> Generator[Made[Notes], None, None]:
    stages = Stages()
    for places in batches:
        columns = fresh(maker.layout, len(places))
        notes = maker.make(places, columns, lambda _, number: maker.read(number), stages)
        moved = {name: column.to(device, non_blocking=True) for name, column in columns.items()}
        yield Made(moved, [notes], stages.take())


def _forked(
    maker: Maker[Notes], tasks: Tasks, data: Data, device: torch.device, rank: int
) -> Generator[Made[Notes], None, None]:
    """`data.prefetch` batches are being made while one is waited for. Of the two slots beyond, one may still be copied
    from and one is spare, so that a slot that is needed was copied two batches ago, and is not waited for."""
    slab = Slab(maker.layout, tasks.rows, data.prefetch + 3)
    workers = Workers(
        _Job(maker, tasks, slab, data.read_ahead), tasks.workers, rank, patience_s=max(PATIENCE_S, 1.2 * data.retry_s)
    )
    try:
        if device.type == "cuda":
            slab.pin()
        allowed = 0
        for batch, places in enumerate(tasks.batches):
            while allowed < min(batch + data.prefetch + 1, len(tasks.batches)):
                slab.wait_free(allowed)
                for task in tasks.of(allowed):
                    workers.allow(task)
                allowed += 1
            found = [workers.result(task) for task in tasks.of(batch)]
            work = Work()
            for _, cost in found:
                work.add(cost)
            yield Made(slab.take(batch, len(places), device), [notes for notes, _ in found if notes is not None], work)
    finally:
        workers.close()
        slab.close()


@dataclass(frozen=True)
class _Job(Generic[Notes]):
    """What a worker does with a task, reading its next one ahead."""

    maker: Maker[Notes]
    tasks: Tasks
    slab: Slab
    threads: int

    def start(self, worker: int, workers: int, note: Note) -> Task:
        stages, ahead = Stages(note), ReadAhead(self.maker.read, self.threads)

        def plan(task: int) -> None:
            if self.threads:
                ahead.want([(place, self.maker.number(place)) for place in self.tasks.piece(task)[2]])

        def do(task: int) -> tuple[Notes | None, Work]:
            stages.resume()
            plan(task + workers)
            batch, first, places = self.tasks.piece(task)
            out = {name: column[first : first + len(places)] for name, column in self.slab.slot(batch).items()}
            notes = self.maker.make(places, out, ahead.take, stages) if places else None
            return notes, stages.take()

        plan(worker)
        return do
