"""A report of runs: one HTML file that needs nothing else, for a browser of any size, in light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError
from pretrain.report import ran
from pretrain.report.chart import Look
from pretrain.report.html import Html
from pretrain.report.likeness import Likeness
from pretrain.report.page import Detail, Held, page
from pretrain.report.pairs import Shown

LARGEST = 3_000_000
"""Bytes of a report."""


@dataclass(frozen=True)
class Written:
    """What was made."""

    file: str
    bytes: int
    runs: list[str]
    pairs: list[str]
    """Of each run: how many held-out pairs are shown, or why there are none."""


def write(
    runs: Sequence[Path],
    out: Path | None = None,
    pairs: int = 128,
    average: bool | None = None,
    data: tuple[str, ...] = (),
) -> Written:
    """Write the report of one run or of several beside each other. Runs may be running, or have crashed.

    Args:
        runs: run folders.
        out: the file; None: report.html in the first run's folder.
        pairs: held-out pairs to look at, of each run; 0: none, which needs no torch and no checkpoint.
        average: whether to take the averaged weights; None: where there are any.
        data: held-out shards in place of each run's own.

    Raises:
        UserError: a folder is no run's, a config is no YAML, or the file cannot be written.
    """
    found = ran.read(runs)
    held: Held = {run: _held(run, pairs, average, data) for run in dict.fromkeys(runs)} if pairs else {}
    document = _bounded(found, held)
    target = out or runs[0] / "report.html"
    try:
        target.write_text(document, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): name another file with --out") from None
    told = [_told(held.get(run, "not asked for")) for run in runs]
    return Written(str(target), target.stat().st_size, [str(run) for run in runs], told)


def _held(run: Path, most: int, average: bool | None, data: tuple[str, ...]) -> Likeness | str:
    """The pairs, or why there are none: a report of a run without a checkpoint is a report."""
    from pretrain.report.held_out import of_run

    try:
        return Likeness(of_run(run, most, average, data))
    except (UserError, OSError) as error:
        return " ".join(str(error).split())[:400]


def _bounded(runs: Sequence[ran.Ran], held: Held) -> Html:
    """The most detailed page that is small enough."""
    for detail in _details():
        document = page(runs, held, detail)
        if len(document.encode()) <= LARGEST:
            return document
    raise UserError(f"a report of {len(runs)} runs would be larger than {LARGEST:,} bytes: name fewer")


def _details() -> Iterator[Detail]:
    yield Detail()
    yield Detail(Look(120, 24), Shown(64, 8, 4, 5, 4), 3)
    yield Detail(Look(60, 12), Shown(48, 6, 3, 4, 3), 1)
    yield Detail(Look(30, 6), Shown(32, 4, 2, 3, 2), 0)


def _told(found: Likeness | str) -> str:
    return found if isinstance(found, str) else f"{len(found.pairs)}"
