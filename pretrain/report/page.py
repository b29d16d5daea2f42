"""The page: one document with everything in it, that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pretrain import __version__
from pretrain.report import curves, differences, pairs, results, story
from pretrain.report.chart import Look
from pretrain.report.html import Html, join, raw, tag
from pretrain.report.likeness import Likeness
from pretrain.report.pairs import Shown
from pretrain.report.ran import Ran
from pretrain.report.style import SHEET

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a browser may do with the page: no script, no request."""
Held = Mapping[Path, Likeness | str]
"""By run: its held-out pairs, or why there are none."""


@dataclass(frozen=True)
class Detail:
    """How much goes into the page."""

    look: Look = field(default_factory=Look)
    shown: Shown = field(default_factory=Shown)
    pictured: int = 4
    """Runs whose pairs are shown."""


def page(runs: Sequence[Ran], held: Held, detail: Detail) -> Html:
    """The document."""
    sections = list(_sections(runs, held, detail))
    links = [tag("li", tag("a", title, href=f"#{_anchor(title)}")) for title, _ in sections]
    body = [
        tag("a", "Skip to the curves", href="#main", class_="skip"),
        _header(runs),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", *(_section(title, inside) for title, inside in sections), id="main", tabindex="-1"),
        tag("footer", tag("p", f"Written by pretrain {__version__} at {_now()} from files in {_folders(runs)}.")),
    ]
    return join([raw("<!doctype html>\n"), tag("html", _head(runs), tag("body", *body), lang="en")])


def _sections(runs: Sequence[Ran], held: Held, detail: Detail) -> list[tuple[str, Html]]:
    charts = [chart.draw(detail.look) for chart in curves.charts(runs)]
    empty = tag("p", "No step is logged yet.", class_="note")
    intro = tag("p", "All by samples seen. Point at a curve, or tap it, for its values; a table lies under each.")
    drawn = tag("div", *charts, class_="grid-cards") if charts else empty
    return [
        ("Curves", join([intro, story.signs(runs), drawn])),
        ("What happened", _each(runs, [story.happened(run) for run in runs])),
        ("Evaluation", results.section(runs, detail.look)),
        ("Held-out pairs", _each(runs, [_pairs(run, n, held, detail) for n, run in enumerate(runs)])),
        ("Config", differences.section(runs)),
    ]


def _pairs(run: Ran, n: int, held: Held, detail: Detail) -> Html:
    found = held.get(run.path, "they were not asked for")
    if isinstance(found, str):
        return tag("p", f"No held-out pairs are shown: {found}", class_="note")
    if n >= detail.pictured:
        return tag("p", f"Pairs of the first {detail.pictured} runs only, so that the page stays small.", class_="note")
    return pairs.section(found, detail.shown)


def _each(runs: Sequence[Ran], parts: Sequence[Html]) -> Html:
    """What is told of each run, under its name where there are several."""
    if len(runs) == 1:
        return parts[0]
    return join(join([tag("h3", run.name, class_="run"), part]) for run, part in zip(runs, parts, strict=True))


def _section(title: str, inside: Html) -> Html:
    anchor = _anchor(title)
    return tag("section", tag("h2", title, id=f"{anchor}-title"), inside, id=anchor, aria_labelledby=f"{anchor}-title")


def _header(runs: Sequence[Ran]) -> Html:
    if len(runs) == 1:
        about = tag("p", _about(runs[0]), class_="soft")
        return tag("header", tag("h1", runs[0].name), about, story.tiles(runs[0]))
    return tag("header", tag("h1", f"{len(runs)} runs"), tag("p", _folders(runs), class_="soft"), story.overview(runs))


def _about(run: Ran) -> str:
    """Model, objective, batch and ranks, as far as they are known."""
    model, objective = run.config.get("model"), run.config.get("objective")
    listed = objective if isinstance(objective, list) else [objective]
    names = [str(item["name"]) for item in listed if isinstance(item, dict) and "name" in item]
    parts = [str(model["name"])] if isinstance(model, dict) and "name" in model else []
    parts += [" + ".join(names)] if names else []
    ranks = run.status.life.ranks
    return ", ".join([*parts, f"batch {run.batch:,}", *([f"{ranks} rank{'s' * (ranks != 1)}"] if ranks else [])])


def _head(runs: Sequence[Ran]) -> Html:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        raw(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"{title}: training report"),
        tag("style", raw(SHEET)),
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _folders(runs: Sequence[Ran]) -> str:
    return ", ".join(str(run.path) for run in runs)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
