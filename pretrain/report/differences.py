"""Knobs and environments of the runs: what differs, or all of one run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pretrain.history import compare
from pretrain.report.html import Html, join, table, tag
from pretrain.report.ran import Ran


def section(runs: Sequence[Ran]) -> Html:
    """Differences between runs, and the whole config of each, folded."""
    whole = [
        tag(
            "details",
            tag("summary", f"config.yaml of {run.name}"),
            tag("pre", yaml.safe_dump(dict(run.config), sort_keys=False), tabindex="0"),
        )
        for run in runs
        if run.config
    ]
    return join([_between(runs) if len(runs) > 1 else "", *whole])


def _between(runs: Sequence[Ran]) -> Html:
    found = compare.compare([run.path for run in runs])
    names = [run.name for run in runs]
    knobs = [[row["knob"], *_values(row)] for row in found["knobs"]]
    facts = [[row["fact"], *(_cell(value) for value in row["values"])] for row in found["environment"]]
    parts = [_titled("Knobs", ["knob", *names], knobs), _titled("Environment", ["fact", *names], facts)]
    return tag("div", *parts, class_="grid-cards wide-cards")


def _titled(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    body = table(heads, rows) if rows else tag("p", "No difference.", class_="soft")
    return tag("div", tag("h3", title), body, class_="card")


def _values(row: Mapping[str, Any]) -> list[str]:
    marks = [" (default)" if is_default else "" for is_default in row["is_default"]]
    return [_cell(value) + mark for value, mark in zip(row["values"], marks, strict=True)]


def _cell(value: Any) -> str:
    return "–" if value is None else " ".join(str(value).split())[:200]
