"""A chart of curves over samples: SVG without scripts, whose values show under the pointer, and a table of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.report import scales
from pretrain.report.html import Html, join, table, tag
from pretrain.report.marks import SIGNS, Mark
from pretrain.report.records import Line
from pretrain.report.scales import Axis, place, short

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400.0, 220.0, 46.0, 10.0, 14.0, 24.0
COLORS = 6
"""Of the style sheet; further lines take the same ones, dashed."""
ROWS = 8
"""Of the table under a chart."""


@dataclass(frozen=True)
class Look:
    """How much of it a page can hold."""

    buckets: int = 240
    """Of a curve; each gives up to two points."""
    stops: int = 40
    """Places at which a chart tells its values."""


@dataclass(frozen=True)
class Chart:
    """Curves on common axes."""

    title: str
    about: str
    """What one sees, in a sentence."""
    lines: Sequence[Line]
    """Those that have a finite value; at least one."""
    marks: Sequence[Mark] = ()
    floor: float | None = None
    """A value that belongs on the axis."""
    dots: bool = False
    """Whether each value is a dot: measurements that lie apart."""

    def draw(self, look: Look) -> Html:
        """The figure: heading, legend, picture, table."""
        across, up = self._axes()
        thin = [line.thinned(look.buckets) for line in self.lines]
        parts = [*_grid(across, up), *_marks(self.marks, across), *_curves(thin, across, up, self.dots)]
        stops = list(_stops(thin, across, up, look.stops))
        told = "; ".join(f"{line.name} {short(line.last)}" for line in self.lines)
        view = f"0 0 {WIDTH:g} {HEIGHT:g}"
        label = f"{self.title}: {self.about} Last: {told}."
        svg = tag("svg", *parts, *stops, viewBox=view, role="img", aria_label=label, class_="chart")
        numbers = tag("details", tag("summary", "Numbers"), self._table())
        return tag("figure", self._heading(), svg, numbers, class_="card", tabindex="0", id=_slug(self.title))

    def _axes(self) -> tuple[Axis, Axis]:
        seen = [line.y[np.isfinite(line.y)] for line in self.lines]
        ends = [float(end) for values in seen for end in (values.min(), values.max())]
        samples = np.concatenate([line.x for line in self.lines])
        low, high = float(samples.min()), float(samples.max())
        low = 0.0 if low < 0.25 * high else low
        across = Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)
        return across, scales.around(ends, HEIGHT - BOTTOM, TOP, self.floor)

    def _heading(self) -> Html:
        value = tag("span", short(self.lines[0].last), class_="now") if len(self.lines) == 1 else ""
        heading = tag("h3", tag("span", self.title), value)
        keys = [tag("li", _key(n), f" {line.name} ", tag("b", short(line.last))) for n, line in enumerate(self.lines)]
        legend = tag("ul", *keys, class_="legend") if len(self.lines) > 1 else ""
        return tag("figcaption", heading, tag("p", self.about), legend)

    def _table(self) -> Html:
        """Some rows of every line, between its own points."""
        samples = np.unique(np.concatenate([line.x for line in self.lines]))
        some = samples[np.unique(np.linspace(0, len(samples) - 1, ROWS).round().astype(int))]
        columns = [np.interp(some, line.x, line.y, left=math.nan, right=math.nan) for line in self.lines]
        rows = [(f"{at:,.0f}", *(short(float(y[n])) for y in columns)) for n, at in enumerate(some)]
        return table(["samples", *(line.name for line in self.lines)], rows, self.title)


def _slug(title: str) -> str:
    return "chart-" + "".join(c if c.isalnum() else "-" for c in title.lower())


def _color(n: int) -> str:
    return f"s{n % COLORS}" + " dashed" * (n // COLORS % 2)


def _key(n: int) -> Html:
    line = tag("path", d="M1 5h18", class_=f"line {_color(n)}")
    return tag("svg", line, viewBox="0 0 20 10", class_="key", aria_hidden="true")


def _grid(across: Axis, up: Axis) -> Iterator[Html]:
    for value in up.ticks():
        y = place(up.at(value))
        yield tag("path", d=f"M{LEFT:g} {y}H{WIDTH - RIGHT:g}", class_="grid")
        yield tag("text", short(value), x=LEFT - 6, y=y, class_="tick end")
    for value in across.ticks(4):
        yield tag("text", short(value), x=place(across.at(value)), y=HEIGHT - 6, class_="tick middle")
    yield tag("path", d=f"M{LEFT:g} {HEIGHT - BOTTOM:g}H{WIDTH - RIGHT:g}", class_="axis")


def _marks(marks: Sequence[Mark], across: Axis) -> Iterator[Html]:
    for mark in marks:
        if mark.samples > across.high:
            continue
        x, end = across.at(mark.samples), across.at(mark.until)
        width, height = max(end - x, 0.0), HEIGHT - BOTTOM - TOP
        shape = tag("path", d=f"M{place(x)} {TOP:g}v{height:g}")
        if width:
            shape = tag("rect", x=place(x), y=TOP, width=place(width), height=height)
        sign = tag("text", SIGNS[mark.kind][0], x=place(x), y=TOP - 3, class_="middle")
        yield tag("g", tag("title", mark.words), shape, sign, class_=f"mark {mark.kind}")


def _curves(lines: Sequence[Line], across: Axis, up: Axis, dots: bool) -> Iterator[Html]:
    for n, line in enumerate(lines):
        yield tag("path", d=_path(line, across, up), class_=f"line {_color(n)}")
        for at, value in zip(line.x, line.y, strict=True):
            if math.isfinite(value) and (dots or len(line.x) == 1):
                yield tag("circle", cx=place(across.at(at)), cy=place(up.at(value)), r="3.5", class_=f"dot {_color(n)}")


def _path(line: Line, across: Axis, up: Axis) -> str:
    """Broken where a value is not finite."""
    steps, drawing = [], False
    for at, value in zip(line.x, line.y, strict=True):
        good = math.isfinite(value)
        if good:
            steps.append(f"{'L' if drawing else 'M'}{place(across.at(at))} {place(up.at(value))}")
        drawing = good
    return "".join(steps) or "M0 0"


def _stops(lines: Sequence[Line], across: Axis, up: Axis, most: int) -> Iterator[Html]:
    """Places that show, while the pointer is over them, the values of every line there."""
    samples = np.unique(np.concatenate([line.x for line in lines]))
    some = samples[np.unique(np.linspace(0, len(samples) - 1, most).round().astype(int))]
    middles = (some[1:] + some[:-1]) / 2
    starts, ends = [across.low, *middles], [*middles, across.high]
    for at, start, end in zip(some, starts, ends, strict=True):
        values = [float(np.interp(at, line.x, line.y, left=math.nan, right=math.nan)) for line in lines]
        x, from_x = across.at(float(at)), across.at(float(start))
        area = {"x": place(from_x), "width": place(max(across.at(float(end)) - from_x, 0.1))}
        hit = tag("rect", y=TOP, height=HEIGHT - BOTTOM - TOP, class_="hit", **area)
        rule = tag("path", d=f"M{place(x)} {TOP:g}V{HEIGHT - BOTTOM:g}", class_="rule")
        dots = [
            tag("circle", cx=place(x), cy=place(up.at(value)), r="3", class_=f"dot {_color(n)}")
            for n, value in enumerate(values)
            if math.isfinite(value)
        ]
        named = [(line.name, value) for line, value in zip(lines, values, strict=True)]
        yield tag("g", hit, rule, *dots, _tip(x, f"{at:,.0f} samples", named), class_="stop")


def _tip(x: float, head: str, named: Sequence[tuple[str, float]]) -> Html:
    rows = [head, *(f"{name[:22]} {short(value)}" for name, value in named)]
    width, height = 12 + 6.1 * max(map(len, rows)), 8 + 14 * len(rows)
    left = x + 8 if x + 8 + width < WIDTH else x - 8 - width
    spans = [tag("tspan", row, x=place(left + 6), dy="14") for row in rows]
    box = tag("rect", x=place(left), y=TOP + 4, width=place(width), height=height, rx="4")
    return join([box, tag("text", *spans, y=TOP + 6)])
