"""Evaluation over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pretrain.report.chart import Chart, Look
from pretrain.report.html import Html, join, table, tag
from pretrain.report.ran import Ran, Result
from pretrain.report.records import Line
from pretrain.report.scales import short

LINES, COLUMNS, CLASSES = 6, 6, 12
"""Of a chart; steps of a table; classes that are shown."""


def section(runs: Sequence[Ran], look: Look) -> Html:
    """Charts of what was measured at several steps, a table of the newest numbers, the weakest classes."""
    tasks = list(dict.fromkeys(result.task for run in runs for result in run.results))
    if not tasks:
        hint = "Nothing was measured yet: pretrain evaluate RUN --task zero_shot, or TASK=SAMPLES in data.eval."
        return tag("p", hint, class_="note")
    parts = [chart.draw(look) for task in tasks for chart in _charts(task, runs)]
    cards = [tag("div", tag("h3", task), body, class_="card") for task in tasks if (body := _table(task, runs))]
    cards += [_weakest(run, task) for run in runs for task in tasks]
    return join(
        [
            tag("div", *parts, class_="grid-cards") if parts else "",
            tag("div", *cards, class_="grid-cards wide-cards", style="margin-top:1rem" if parts else None),
        ]
    )


def _charts(task: str, runs: Sequence[Ran]) -> Iterator[Chart]:
    """Shares, which lie between 0 and 1; nothing where each run was measured once."""
    names = list(dict.fromkeys(name for run in runs for result in _of(run, task) for name in result.numbers))
    lines = {name: [line for run in runs if (line := _line(run, task, name, len(runs) > 1))] for name in names}
    several = [name for name in names if any(len(line.x) > 1 for line in lines[name])]
    shares = [name for name in several if all(0 <= y <= 1 for line in lines[name] for y in line.y)][:LINES]
    if not shares:
        return
    about = "On held-out data, by samples seen."
    if len(runs) == 1:
        yield Chart(f"{task}", about, [line for name in shares for line in lines[name]], runs[0].marks, dots=True)
        return
    for name in shares:
        yield Chart(f"{task}: {_plain(name)}", about, lines[name], dots=True)


def _line(run: Ran, task: str, name: str, of_several: bool) -> Line | None:
    found = [(result.step * run.batch, result.numbers[name]) for result in _of(run, task) if name in result.numbers]
    if not found:
        return None
    x, y = np.array(found, dtype=float).T
    return Line(run.name if of_several else _plain(name), x, y)


def _table(task: str, runs: Sequence[Ran]) -> Html | None:
    """Columns are steps of one run, or the newest measurement of each run."""
    if len(runs) == 1:
        columns = [(f"step {result.step:,}", result) for result in _of(runs[0], task)[-COLUMNS:]]
    else:
        columns = [(f"{run.name} (step {found[-1].step:,})", found[-1]) for run in runs if (found := _of(run, task))]
    names = list(dict.fromkeys(name for _, result in columns for name in result.numbers))
    rows = [[_plain(name), *(short(result.numbers.get(name)) for _, result in columns)] for name in names]
    return table(["metric", *(head for head, _ in columns)], rows) if rows else None


def _weakest(run: Ran, task: str) -> Html:
    found = _of(run, task)
    classes = found[-1].per_class if found else {}
    if not classes:
        return join([])
    worst = sorted(classes.items(), key=lambda item: item[1])[:CLASSES]
    cells = [
        cell
        for name, value in worst
        for cell in (
            tag("span", name),
            tag("i", style=f"--v:{min(max(value, 0), 1):.3f}", aria_hidden="true"),
            tag("span", f"{value:.1%}"),
        )
    ]
    which = "All classes" if len(worst) == len(classes) else f"The weakest {len(worst)} of {len(classes):,} classes"
    about = tag("p", f"{which}, {run.name}, at step {found[-1].step:,}.", class_="soft")
    return tag("div", tag("h3", f"{task}: classes"), about, tag("div", *cells, class_="bars"), class_="card")


def _of(run: Ran, task: str) -> list[Result]:
    return [result for result in run.results if result.task == task]


def _plain(name: str) -> str:
    return name.replace("_", " ")
