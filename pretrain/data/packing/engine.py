"""Inputs -> shards on all cores: unit k is a fixed range of the input list, whoever builds it and however often.

A unit's tars are put in place whole, then its record; what has a record is never built again, unless its inputs or
the sizes of its tars are others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

from pretrain.data.images.decode import BadSample
from pretrain.data.packing.how import How
from pretrain.data.packing.places import UNITS, WHOLE, Place, place
from pretrain.data.packing.polish import Polish
from pretrain.data.packing.writing import Members, ShardWriter, key
from pretrain.data.processes import Tick, cores, spread
from pretrain.data.progress import Meter
from pretrain.data.texts.captions import MAX_TEXT_BYTES
from pretrain.errors import UserError

_FORMAT = 1
"""Of what is packed: raised when the same inputs would give other bytes."""
_SHOWN = 20
_TICK = 32
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""One input's own trouble. Any other error of reading may be the disk's or the network's, and ends the command."""


class Inputs(Protocol):
    """A list of samples to come. Travels to worker processes."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the list depends on, for json."""
        ...

    @property
    def total(self) -> int | None:
        """Length of the list; None: nobody knows before it was read."""
        ...

    def items(self) -> Iterator[Any]:
        """The list; items are for json."""
        ...

    def name(self, item: Any) -> str:
        """For messages."""
        ...

    def read(self, item: Any, polish: Polish) -> tuple[str | None, Members]:
        """A sample's key (None: a number will do) and members.

        Raises:
            BadSample, FileNotFoundError, PermissionError: this one cannot be used.
            OSError, UserError: nothing can be read.
        """
        ...


class Task(NamedTuple):
    number: int
    items: list[Any]
    digest: str


@dataclass(frozen=True)
class Unit:
    """The record of what became of one range of inputs."""

    digest: str
    inputs: int
    shards: dict[str, int] = field(default_factory=dict)
    """Tar -> samples."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Tar -> bytes."""
    changed: dict[str, int] = field(default_factory=dict)
    skipped: list[list[str]] = field(default_factory=list)
    """[input, reason]."""


@dataclass(frozen=True)
class PackReport:
    """What was packed."""

    folder: str
    samples: dict[str, int]
    """By split; '' where there is only one."""
    shards: dict[str, int]
    bytes: int
    """Of all shards."""
    changed: dict[str, int] = field(default_factory=dict)
    """What was done to images and captions, and to how many."""
    skipped: dict[str, int] = field(default_factory=dict)
    """What was left out: reason, with numbers as N -> how many. OUT/skipped.jsonl names each."""
    first_skipped: tuple[str, ...] = ()
    """The first of them, a line each."""


def pack(kind: str, inputs: Inputs, out: str | Path, how: How) -> PackReport:
    """Pack all inputs, or go on with it.

    Raises:
        UserError: OUT is there, was begun with other arguments or inputs, or nothing could be packed.
        ProcessDied: a worker was killed, or left.
    """
    there = place(out)
    made_by = {name: metadata.version(name) for name in ("pillow", "simplejpeg")}  # other ones may give other bytes
    arguments = {"kind": kind, "format": _FORMAT} | made_by | inputs.facts | how.facts()
    try:
        with there.begin(arguments):
            units = _build_all(inputs, there, how, f"pack {out}")
            report = _report(str(out), units)
            if not report.samples[""]:
                there.drop()
                why = f", {report.first_skipped[0]}" if report.first_skipped else ""
                raise UserError(f"pack {kind}: no pair of image and caption was found{why}")
            _conclude(there, arguments, units, report)
    except OSError as error:
        what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        raise UserError(f"pack {out}: {what}; mend that, and the same command goes on where it was") from None
    return report


def _build_all(inputs: Inputs, there: Place, how: How, name: str) -> list[Unit]:
    """The records of all units, in order."""
    units: dict[int, Unit] = {}
    meter = Meter(name, inputs.total)

    def tasks() -> Iterator[Task]:
        for task in _tasks(inputs, how.samples_per_shard):
            known = _known(there, task)
            if known is None:
                yield task
            else:
                units[task.number] = known
                meter.keep(known.inputs)

    try:
        for number, unit in spread(Build(inputs, there, how), tasks(), how.workers or cores(), meter.add):
            units[number] = unit
    except BaseException:
        if there.fresh and not units:
            with contextlib.suppress(OSError):
                there.drop()  # nothing is lost, and a mistake leaves nothing behind
        raise
    finally:
        meter.close()
    return [units[number] for number in sorted(units)]


def _tasks(inputs: Inputs, size: int) -> Iterator[Task]:
    items = inputs.items()
    for number in itertools.count():
        part = list(itertools.islice(items, size))
        if not part:
            return
        yield Task(number, part, xxhash.xxh3_128_hexdigest(json.dumps(part, default=str).encode()))


def _known(there: Place, task: Task) -> Unit | None:
    """The record of a unit that is done."""
    stored = there.read(_record(task.number))
    if stored is None:
        return None
    unit = Unit(**json.loads(stored))
    if unit.digest != task.digest:
        raise UserError(
            f"pack: the inputs of unit {task.number} are others than when this was begun; "
            "put them back, or remove what was begun and start again"
        )
    return unit if all(there.size(name) == size for name, size in unit.sizes.items()) else None


def _record(number: int) -> str:
    return f"{UNITS}/{number:05d}.json"


class Build:
    """Builds one unit: its tars, then its record."""

    def __init__(self, inputs: Inputs, there: Place, how: How) -> None:
        self._inputs, self._place, self._how = inputs, there, how

    def __call__(self, task: Task, tick: Tick) -> tuple[int, Unit]:
        polish, skipped = Polish(self._how), list[list[str]]()
        limit = self._how.max_shard_mb
        names = f"{task.number:05d}.tar" if limit is None else f"{task.number:05d}-{{part:02d}}.tar"
        with self._place.scratch() as folder:
            writer = ShardWriter(folder, names, None if limit is None else int(limit * 1e6))
            with contextlib.closing(writer):
                for name, members in self._samples(task, polish, skipped, tick):
                    writer.add(name, members)
            sizes = {name: (folder / name).stat().st_size for name in writer.shards}
            for name in writer.shards:
                self._place.take(name, folder / name)
        unit = Unit(task.digest, len(task.items), writer.shards, sizes, dict(polish.changed), skipped)
        self._place.write(_record(task.number), json.dumps(asdict(unit)).encode())
        return task.number, unit

    def _samples(
        self, task: Task, polish: Polish, skipped: list[list[str]], tick: Tick
    ) -> Iterator[tuple[str, Members]]:
        taken, done, size = Counter[str](), 0, 0
        for number, item in enumerate(task.items):
            done, before = done + 1, polish.changed.copy()
            try:
                own, members = self._inputs.read(item, polish)
                _check(members)
            except UserError:  # also a shard that is gone, which is a FileNotFoundError too
                raise
            except (BadSample, *_MISSING) as error:
                polish.changed = before  # what was done to what is left out does not count
                skipped.append([self._inputs.name(item), getattr(error, "strerror", None) or str(error)])
            else:
                size += sum(len(content) for _, content in members)
                yield _unique(own or key(task.number, number), taken, polish), members
            if done == _TICK:
                tick(done, size)
                done = size = 0
        tick(done, size)


def _check(members: Members) -> None:
    """BadSample: a text is longer than what is read in training, where it would be lost without a word from here."""
    for extension, content in members:
        if extension in ("txt", "json") and len(content) > MAX_TEXT_BYTES:
            raise BadSample(f"the {extension} member has {len(content)} bytes, the limit is {MAX_TEXT_BYTES}")


def _unique(name: str, taken: Counter[str], polish: Polish) -> str:
    """A key that the unit does not have yet: keys of other shards are unique only there."""
    own = name
    while own in taken:
        taken[name] += 1
        own = f"{name}~{taken[name]}"
    taken[own] += 1
    polish.changed["keys renamed"] += own != name
    return own


def _report(out: str, units: list[Unit]) -> PackReport:
    changed, reasons, lines = Counter[str](), Counter[str](), list[str]()
    for unit in units:
        changed.update({what: times for what, times in unit.changed.items() if times})
        reasons.update(re.sub(r"(?<![\w-])\d+", "#", reason) for _, reason in unit.skipped)
        lines += [f"{name}: {reason}" for name, reason in unit.skipped[: _SHOWN - len(lines)]]
    return PackReport(
        folder=out,
        samples={"": sum(sum(unit.shards.values()) for unit in units)},
        shards={"": sum(len(unit.shards) for unit in units)},
        bytes=sum(sum(unit.sizes.values()) for unit in units),
        changed=dict(sorted(changed.items())),
        skipped=dict(sorted(reasons.items())),
        first_skipped=tuple(lines),
    )


def _conclude(there: Place, arguments: dict[str, Any], units: list[Unit], report: PackReport) -> None:
    skipped = [{"input": name, "reason": reason} for unit in units for name, reason in unit.skipped]
    if skipped:
        there.write("skipped.jsonl", "".join(json.dumps(line) + "\n" for line in skipped).encode())
    sizes = {name: samples for unit in units for name, samples in unit.shards.items()}
    there.write("sizes.json", json.dumps(sizes, indent=1).encode())  # for data.sizes, and for open_clip
    facts = {"arguments": arguments} | {k: v for k, v in asdict(report).items() if k not in ("folder", "first_skipped")}
    there.write(WHOLE, json.dumps(facts, indent=2, default=str).encode())
    there.finish(sizes)
