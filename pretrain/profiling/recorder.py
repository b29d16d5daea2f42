"""Some steps in full: torch.profiler's trace with phases in it, memory by phase, and a summary to read first.

On a GPU torch.cuda's own memory snapshot (open it at pytorch.org/memory_viz) tells which line allocated what. A CPU's
allocator has none: there, and on a GPU too, memory by phase is computed from the allocations in the trace.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from pretrain.errors import UserError
from pretrain.metrics import peak_memory_bytes
from pretrain.phases import listening, phase
from pretrain.profiling.memory import Allocation, Range, Use, by_phase
from pretrain.profiling.summary import summary
from pretrain.profiling.timer import timer
from pretrain.profiling.window import Window
from pretrain.world import World

Item = TypeVar("Item")
MARK = "phase "
HISTORY = 1_000_000
"""Allocations that a CUDA snapshot remembers."""

log = logging.getLogger(__name__)


class Ranges:
    """A listener that makes phases ranges of the trace, each in its own thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def enter(self, name: str, detail: str) -> None:
        opened: AbstractContextManager[Any] = record_function(f"{MARK}{name}", detail or None)
        opened.__enter__()
        self._stack().append(opened)

    def leave(self, name: str) -> None:
        if stack := self._stack():
            stack.pop().__exit__(None, None, None)

    def _stack(self) -> list[AbstractContextManager[Any]]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[AbstractContextManager[Any]] = self._local.stack
        return stack


class Recorder:
    """Records the steps of a window; without a window it does nothing."""

    def __init__(self, window: Window | None, folder: Path, world: World, steps_left: int) -> None:
        """
        Args:
            folder: for what is found; files of an earlier profile are replaced.
            steps_left: of this start.

        Raises:
            UserError: the window ends after this start does.
        """
        if window is not None and window.last > steps_left:
            advice = "name some of those" if steps_left else "the run has seen all its samples"
            raise UserError(f"--profile {window}: this start has {steps_left} steps to go; {advice}")
        self.window, self.folder, self.world = window, folder, world
        self._seen, self._begun, self._opened = 0, False, ExitStack()

    def over(
        self, batches: Iterable[Item], pause: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Iterator[Item]:
        """The same batches; a step lasts from before one is read until the next is asked for.

        Args:
            pause: around the recorder's own work, which is none of a step's.
        """
        each = iter(batches)
        try:
            while True:
                with pause():
                    self._begin(self._seen + 1)
                try:
                    batch = next(each)
                except StopIteration:
                    return
                yield batch
                self._seen += 1
                with pause():
                    self._end(self._seen)
        finally:  # a run that stops or goes back within the window leaves what was recorded
            self._close()

    def _begin(self, step: int) -> None:
        if self.window is None:
            return
        if step == max(self.window.first - 1, 1):
            self._trace = profile(
                activities=_activities(self.world.device),
                # The first step under a profiler is slow: one before the window bears that.
                schedule=schedule(wait=0, warmup=int(self.window.first > 1), active=len(self.window), repeat=1),
                on_trace_ready=self._write,
                profile_memory=True,
            )
            self._trace.start()
            self._opened.callback(self._trace.stop)
        if step == self.window.first:
            self._begun = True
            self._timer, self._held = timer(self.world.device), _allocated(self.world.device)
            self._opened.enter_context(listening(Ranges(), self._timer))
            _remember_allocations(self.world.device, True)

    def _end(self, step: int) -> None:
        if self.window is not None and max(self.window.first - 1, 1) <= step <= self.window.last:
            self._trace.step()
            if step == self.window.last:
                self._close()

    def _close(self) -> None:
        self._opened.close()
        if self._begun:  # once: a loop that begins again records nothing more
            self.window = None

    def _write(self, trace: profile) -> None:
        assert self.window is not None
        steps, rank = max(self._seen - self.window.first + 1, 1), f"rank{self.world.rank:05d}"
        seconds = {name: found / steps for name, found in self._timer.take().items()}
        what = f"{steps} steps from {self.window} of this start, rank {self.world.rank} of {self.world.size}"
        with phase("writing", f"profile of {rank}"):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                trace.export_chrome_trace(str(self.folder / f"trace_{rank}.json.gz"))
                memory = memory_by_phase(trace, self.world.device, self._held)
                self._text(f"memory_{rank}.json", json.dumps({name: asdict(use) for name, use in memory.items()}))
                peak = peak_memory_bytes(self.world.device)
                self._text(f"summary_{rank}.txt", summary(what, seconds, memory, peak, _operators(trace)))
                _dump_allocations(self.world.device, self.folder / f"memory_{rank}.pickle")
            except OSError as error:  # a profile is not worth a run
                log.warning("the profile of rank %d could not be written: %s", self.world.rank, error)

    def _text(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text + "\n", encoding="utf-8")


def memory_by_phase(trace: profile, device: torch.device, held: int) -> dict[str, Use]:
    """Memory of each phase in a finished trace, on one device.

    Args:
        held: bytes when the trace began; what a CPU held then is unknown to torch, and 0.
    """
    events: list[Any] = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    allocations = [
        Allocation(event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type().name == device.type.upper()
    ]
    ranges = [
        Range(event.name().removeprefix(MARK), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name().startswith(MARK) and event.device_type().name == "CPU"
    ]
    return by_phase(allocations, ranges, held)


def _operators(trace: profile) -> str:
    averages = trace.key_averages()
    on_device = any(event.self_device_time_total for event in averages)
    by = "self_device_time_total" if on_device else "self_cpu_time_total"
    table: str = averages.table(sort_by=by, row_limit=20, max_name_column_width=48)
    return table


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _remember_allocations(device: torch.device, on: bool) -> None:
    if device.type == "cuda":
        record: Callable[..., None] = torch.cuda.memory._record_memory_history
        record(max_entries=HISTORY) if on else record(enabled=None)


def _dump_allocations(device: torch.device, path: Path) -> None:
    if device.type == "cuda":
        dump: Callable[[str], None] = torch.cuda.memory._dump_snapshot
        dump(str(path))
        _remember_allocations(device, False)
