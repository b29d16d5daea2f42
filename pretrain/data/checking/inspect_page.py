"""The page of `pretrain index --check`: one file without scripts, in which everything from the data is escaped."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

import numpy as np

from pretrain.data.checking.scanning import Picture, Tally

_BINS, _WIDTH, _HEIGHT = 40, 420, 120
_MAX_LINES, _MAX_TEXT = 200, 300
_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse}
td{padding:.1em 1.2em .1em 0;vertical-align:top;overflow-wrap:anywhere}td:first-child{color:#666}
.bad{color:#b00020;overflow-wrap:anywhere}.charts{display:flex;flex-wrap:wrap;gap:1.5em}figure{margin:0}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:1em}
.pictures img{max-width:160px;max-height:160px}figcaption{font-size:12px;overflow-wrap:anywhere}small{color:#777}
svg text{font:10px system-ui,sans-serif;fill:#666}rect{fill:#4878a8}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}
svg text,td:first-child,small{fill:#aaa;color:#aaa}}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(report: Mapping[str, Any], tally: Tally) -> str:
    """The whole page, below 1 MB: at most 24 small pictures, and no text at more than 300 characters."""
    problems = list(report["problems"])
    facts = {name: value for name, value in report.items() if name != "problems"}
    charts = [
        histogram("words of a caption", tally.words),
        histogram("characters of a caption", tally.characters),
        histogram("image width, pixels", tally.widths),
        histogram("image height, pixels", tally.heights),
        histogram("megapixels", tally.pixels, unit=0.01),
    ]
    parts = [
        f"<h1>{report['samples']:,} samples in {report['shards']:,} shards</h1>",
        *_problems(problems),
        "<h2>Histograms</h2><div class=charts>",
        *charts,
        "</div><h2>Facts</h2><table>",
        *_rows("", facts),
        "</table>",
        *_pictures(tally.pictures),
    ]
    head = f'<meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{_POLICY}">'
    return f"<!doctype html><html lang=en><head>{head}<title>Shards</title><style>{_STYLE}</style></head><body>" + (
        "\n".join(parts) + "</body></html>\n"
    )


def histogram(title: str, counts: Counter[int], unit: float = 1.0) -> str:
    """Value -> times as an SVG of at most 40 bars; the last bar takes what lies beyond 1.5 times the 99 % quantile.

    Args:
        unit: what a value of 1 stands for in the labels.
    """
    if not counts:
        return ""
    values = np.array(sorted(counts), np.float64)
    times = np.array([counts[int(value)] for value in values], np.float64)
    high = values[np.searchsorted(np.cumsum(times), 0.99 * times.sum())]
    low, top = values[0], min(values[-1], max(1.5 * high, values[0] + 1))
    bins = int(min(_BINS, top - low + 1))
    edges = np.linspace(low, top + 1, bins + 1)
    heights, _ = np.histogram(values.clip(low, top), edges, weights=times)
    step = _WIDTH / bins
    bars = [
        f"<rect x={n * step:.1f} y={_HEIGHT * (1 - share):.1f} width={step * 0.9:.1f} height={_HEIGHT * share:.1f}>"
        f"<title>from {edges[n] * unit:g}: {int(heights[n]):,}</title></rect>"
        for n, share in enumerate(heights / heights.max())
    ]
    beyond = f" and more (to {values[-1] * unit:,g})" if values[-1] > top else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg width={_WIDTH} height={_HEIGHT + 16} role=img aria-label="{escape(title)}">{"".join(bars)}'
        f"<text x=0 y={_HEIGHT + 13}>{low * unit:,g}</text>"
        f"<text x={_WIDTH} y={_HEIGHT + 13} text-anchor=end>{top * unit:,g}{beyond}</text></svg></figure>"
    )


def _problems(lines: list[str]) -> Iterator[str]:
    if lines:
        yield f"<h2>{len(lines):,} problems</h2>"
    yield from (f"<div class=bad>{_text(line)}</div>" for line in lines[:_MAX_LINES])
    if len(lines) > _MAX_LINES:
        yield f"<div class=bad>and {len(lines) - _MAX_LINES:,} more</div>"


def _rows(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, part in list(value.items())[:_MAX_LINES]:
            yield from _rows(f"{name} {key}".strip(), part)
    elif isinstance(value, list | tuple):
        yield from (row for part in value[:_MAX_LINES] for row in _rows(name, part))
    else:
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        yield f"<tr><td>{_text(name.replace('_', ' '))}<td>{_text(shown)}"


def _pictures(pictures: Iterable[Picture]) -> Iterator[str]:
    shown = list(pictures)
    if not shown:
        return
    yield "<h2>Some samples, drawn at random</h2><div class=pictures>"
    for picture in shown:
        data = base64.b64encode(picture.jpeg).decode()
        yield (
            f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
            f"<figcaption><bdi>{_text(picture.caption)}</bdi><br>"
            f"<small>{_text(picture.key)}, {picture.size[0]} x {picture.size[1]}</small></figcaption></figure>"
        )
    yield "</div>"


def _text(text: str) -> str:
    return escape(text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…", quote=True)
