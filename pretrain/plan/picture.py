"""A picture of how a run scales, as SVG: samples a second, and efficiency, over GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from pretrain.plan.report import Plan
from pretrain.plan.scaling import SIZES, Point

WIDTH, HEIGHT, LEFT, TOP, GAP = 320, 220, 70, 60, 90
COLORS = ("#1b6ca8", "#c0392b")
Scale = Callable[[float], float]


@dataclass(frozen=True)
class _Panel:
    left: int
    title: str
    ticks: Sequence[tuple[float, str]]
    scale: Scale
    """A value -> 0 at the bottom, 1 at the top."""

    def at(self, gpus: int, value: float) -> tuple[float, float]:
        across = math.log2(gpus / SIZES[0]) / math.log2(SIZES[-1] / SIZES[0])
        return self.left + across * WIDTH, TOP + (1 - self.scale(value)) * HEIGHT


def svg(found: Plan) -> str:
    """One picture with a title, two panels and a legend; no script, no font of its own."""
    lines = {
        f"global batch held at {found.step.gpus * found.step.pairs_per_gpu}": found.same_batch,
        f"{found.step.pairs_per_gpu} pairs a GPU held": found.same_share,
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        return _document([_text(20, 28, f"{found.model}: fits no number of {found.gpu}", 15)])
    drawn = [_text(20, 28, f"{found.model} on {found.gpu}: predicted scaling", 15)]
    values: tuple[Callable[[Point], float], ...] = (lambda p: p.prediction.samples_per_s, lambda p: p.efficiency)
    for panel, value in zip((_rates(points), _shares()), values, strict=True):
        drawn += _axes(panel)
        for color, line in zip(COLORS, lines.values(), strict=True):
            drawn += _line(panel, [(point.prediction.gpus, value(point)) for point in line], color)
    for n, (name, color) in enumerate(zip(lines, COLORS, strict=True)):
        drawn.append(_text(LEFT + n * (WIDTH + GAP), TOP + HEIGHT + 62, f"● {name}", 12, color))
    return _document(drawn)


def _rates(points: Sequence[Point]) -> _Panel:
    """Decades that hold every point."""
    values = [math.log10(point.prediction.samples_per_s) for point in points]
    low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)
    ticks = [(10.0**n, f"{10**n:,}" if n >= 0 else f"{10.0**n:g}") for n in range(low, high + 1)]
    return _Panel(LEFT, "samples/s", ticks, lambda value: (math.log10(value) - low) / (high - low))


def _shares() -> _Panel:
    ticks = [(n / 4, f"{25 * n} %") for n in range(5)]
    return _Panel(LEFT + WIDTH + GAP, "efficiency, per GPU", ticks, lambda value: min(value, 1.1))


def _axes(panel: _Panel) -> list[str]:
    drawn = [_text(panel.left, TOP - 10, panel.title, 12)]
    for value, label in panel.ticks:
        _, y = panel.at(SIZES[0], value)
        drawn.append(f'<path d="M{panel.left} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
        drawn.append(_text(panel.left - 6, y + 4, label, 10, anchor="end"))
    for gpus in SIZES:
        x, _ = panel.at(gpus, panel.ticks[0][0])
        drawn.append(_text(x, TOP + HEIGHT + 18, str(gpus), 10, anchor="middle"))
    return [*drawn, _text(panel.left + WIDTH / 2, TOP + HEIGHT + 36, "GPUs", 11, anchor="middle")]


def _line(panel: _Panel, values: Sequence[tuple[int, float]], color: str) -> list[str]:
    places = [panel.at(gpus, value) for gpus, value in values]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    return [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>', *dots]


def _text(x: float, y: float, words: str, size: int, color: str = "#222", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def _document(drawn: Sequence[str]) -> str:
    width, height = 2 * (LEFT + WIDTH) + GAP - 20, TOP + HEIGHT + 80
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )
