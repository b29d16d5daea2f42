"""What differs between runs, for a person: tables with a column for each run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pretrain.show import columns

WIDE = 48
"""Characters of a cell."""


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `compare.compare` found."""
    names = short_names(found["runs"])
    out = [f"{name}: {run}" for name, run in zip(names, found["runs"], strict=True)]
    out += _table("knobs", names, [[row["knob"], *_values(row)] for row in found["knobs"]])
    facts = [[row["fact"], *map(_cell, row["values"])] for row in found["environment"]]
    out += _table("environment", names, facts)
    out += _table("loss at samples", names, list(_losses(found["losses"])))
    out += _distances(names, found["losses"])
    out += _table("speed", names, list(_speed(found["speed"])))
    results = [[f"{row['task']} {row['metric']}", *_results(row)] for row in found["evaluations"]]
    return [*out, *(_table("evaluation", names, results) if results else [])]


def _table(title: str, names: Sequence[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return ["", f"{title}: no difference"]
    return ["", *columns([[title, *names], *rows])]


def short_names(runs: Sequence[str]) -> list[str]:
    """Last parts of the paths, as long as needed to tell them apart."""
    for depth in range(1, 20):
        names = [os.sep.join(run.rstrip(os.sep).split(os.sep)[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{n}: {run}" for n, run in enumerate(runs, 1)]


def _values(row: Mapping[str, Any]) -> list[str]:
    marks = [" (default)" * bool(is_default) for is_default in row["is_default"]]
    return [_cell(value) + mark for value, mark in zip(row["values"], marks, strict=True)]


def _cell(value: Any) -> str:
    text = "-" if value is None else " ".join(str(value).split())
    return text if len(text) <= WIDE else f"{text[: WIDE - 12]}...{text[-9:]}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _losses(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for row in found["at"]:
        yield [f"{row['samples']:,}", *(_number(loss, ".4f") for loss in row["loss"])]
    ends = [f"{_number(end['loss'], '.4f')} at {_number(end['samples'], ',.0f')}" for end in found["final"]]
    yield ["last", *ends]


def _distances(names: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    out = []
    for name, apart, batches in zip(names[1:], found["against_first"], found["batches"], strict=True):
        out.append(f"{name} against {names[0]}: {_apart(apart)}; {_same(batches)}")
    return out


def _apart(apart: Mapping[str, Any]) -> str:
    if not apart["points"]:
        return "no loss at common samples"
    how = " (between logged steps: none was logged at the same samples)" if apart["interpolated"] else ""
    if not apart["max_abs"]:
        return f"losses equal at all {apart['points']:,} points{how}"
    told = f"mean |difference| {apart['mean_abs']:.3g}, largest {apart['max_abs']:.3g} at {apart['max_at']:,} samples"
    return f"{told}, at {apart['points']:,} points{how}"


def _same(batches: Mapping[str, Any]) -> str:
    if not batches["compared"]:
        return "batches: not told (log.batch_digest)"
    if batches["same"] == batches["compared"]:
        return f"batches: the same at all {batches['compared']:,} points"
    first = batches["first_difference"]
    return f"batches: {batches['same']:,} of {batches['compared']:,} the same, the first other one at {first:,} samples"


def _speed(found: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    forms = (("samples_per_s", ",.0f"), ("samples_per_s_of_a_rank", ",.0f"), ("step_s", ".4g"), ("data_wait", ".1%"))
    for name, form in forms:
        yield [name.replace("_", " ").replace("per s", "/ s"), *(_number(one[name], form) for one in found)]
    for phase in dict.fromkeys(name for one in found for name in one["phases_s"]):
        yield [f"  s in {phase}", *(_number(one["phases_s"].get(phase), ".4g") for one in found)]
    peaks = [None if one["peak_memory_bytes"] is None else one["peak_memory_bytes"] / 2**30 for one in found]
    yield ["peak memory, GiB", *(_number(peak, ".2f") for peak in peaks)]


def _results(row: Mapping[str, Any]) -> list[str]:
    told = zip(row["values"], row["steps"], strict=True)
    return ["-" if value is None else f"{_figure(value)} (step {step:,})" for value, step in told]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:.4f}"
