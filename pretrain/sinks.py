"""Where numbers go: files of one JSON object a line, the terminal, TensorBoard, Weights & Biases. Only rank 0 writes.

The files are the run's memory: failing to write them raises. Everything else may fail once, is reported and dropped.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pretrain.checkpoint_files import write_atomic
from pretrain.config import Run
from pretrain.console import Console
from pretrain.trackers import TensorBoard, Wandb
from pretrain.values import Skip
from pretrain.world import World

log = logging.getLogger(__name__)

Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes the records of logged steps."""

    def write(self, record: Record) -> None:
        """Take one record; it holds `samples`, the x axis, and numbers, texts or mappings of numbers."""
        ...

    def close(self) -> None:
        """Everything written so far is where it belongs; nothing of the sink keeps running."""
        ...


class Jsonl:
    """A file of one JSON object a line, each whole when `write` returns; NaN and infinities become null."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """
        Args:
            keep: which records of an existing file belong to this run's one line of history; None: all.

        Raises:
            OSError: the disk is full or failing, here and in `write`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _retain(path, keep)
        self.folder = path.parent
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(_finite(record)) + "\n")

    def close(self) -> None:
        self._file.close()


class Sinks:
    """All sinks of a run; on other ranks than 0 every method does nothing."""

    def __init__(self, files: Mapping[str, Jsonl], others: Sequence[Sink]) -> None:
        """
        Args:
            files: 'metrics', 'skips', 'events'; empty where this rank does not write.
            others: dropped, with one message, when they fail.
        """
        self._files = dict(files)
        self._others = list(others)

    def write(self, record: Record) -> None:
        """A logged step, to every sink.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        if not self._files:
            return
        self._files["metrics"].write(record)
        self._each(lambda sink: sink.write(record))

    def track(self, numbers: Record, samples: int) -> None:
        """Further numbers (an evaluation's) to TensorBoard and Weights & Biases; they are no step of metrics.jsonl."""
        self._each(lambda sink: None if isinstance(sink, Console) else sink.write({**numbers, "samples": samples}))

    def skips(self, skips: Sequence[Skip]) -> None:
        """Samples that were replaced, to skips.jsonl."""
        for skip in skips if self._files else ():
            self._files["skips"].write(asdict(skip))

    def event(self, kind: str, **facts: Any) -> None:
        """Something that happened once (started, resumed, saved, stopped), to events.jsonl with the time in UTC."""
        if self._files:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._files["events"].write({"time": now, "event": kind, **facts})

    def listing(self, name: str, lines: Sequence[str]) -> None:
        """What is too long for an event, one a line, to a file of its own: `name` in the run folder."""
        if self._files:
            write_atomic(self._files["events"].folder / name, "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Close every sink; a tracker that cannot be closed is reported and left."""
        self._each(lambda sink: sink.close())
        for file in self._files.values():
            file.close()
        self._files, self._others = {}, []

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in list(self._others):
            try:
                act(sink)
            except Exception as error:
                log.warning("%s failed and is off for the rest of the run: %s", type(sink).__name__, _line(error))
                self._others.remove(sink)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_sinks(
    run: Run, world: World, total_samples: int, step: int = 0, samples: int = 0, position: int | None = None
) -> Sinks:
    """The sinks that a run asks for.

    Args:
        total_samples: length of the run.
        step: optimizer steps done; later records of an earlier attempt are removed from metrics.jsonl.
        samples: pairs seen.
        position: of the next sample in the data order; later skips are removed likewise, because the run will meet
            them again; None: `samples`.

    Raises:
        OSError: the run folder cannot be written.
    """
    if not world.is_main:
        return Sinks({}, [])
    before = samples if position is None else position
    files = {
        "metrics": Jsonl(run.path / "metrics.jsonl", lambda record: record["step"] <= step),
        "skips": Jsonl(run.path / "skips.jsonl", lambda record: bool(samples) and record["index"] < before),
        "events": Jsonl(run.path / "events.jsonl"),
    }
    makers: list[Callable[[], Sink]] = [
        lambda: Console(total_samples, run.train.global_batch, samples, run.log.progress)
    ]
    makers += [lambda: TensorBoard(run.path / "tensorboard", samples)] if run.log.tensorboard else []
    makers += [lambda: Wandb(run)] if run.log.wandb is not None else []
    return Sinks(files, [sink for make in makers if (sink := _made(make)) is not None])


def _made(make: Callable[[], Sink]) -> Sink | None:
    try:
        return make()
    except Exception as error:
        log.warning("a log sink could not be opened and stays off: %s", _line(error))
        return None


def _retain(path: Path, keep: Callable[[dict[str, Any]], bool] | None) -> None:
    """Remove what does not belong to the history, and lines that a killed process left torn, in one atomic step.

    The file is another one afterwards, always: an earlier attempt that wakes up on a machine that was cut off has the
    old one open, and adds no line to this one.
    """
    kept, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            belongs = keep is None or keep(record)
        except (ValueError, KeyError, TypeError):
            log.warning("%s line %d is not a whole record and was removed: %.80s", path, number, line)
            continue
        kept += [line] if belongs else []
    write_atomic(path, "".join(f"{line}\n" for line in kept))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
