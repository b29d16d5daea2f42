"""Pictures of time and memory against the batch, drawn from committed results alone: `python -m benchmarks.pictures`.

The same results give the same bytes, so that `--check` can tell whether a committed picture is fresh.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.report import RESULTS, ROOT

PICTURES = ROOT / "docs" / "pictures"
STYLE = {"svg.hashsalt": "pretrain", "svg.fonttype": "path", "font.size": 10, "axes.grid": True, "grid.alpha": 0.25}
SIDES = {  # prefix of a side's metrics -> name, colour, width of the line
    "": ("pretrain", "#0b7285", 2.6),
    "open_clip_eager_": ("open_clip", "#c2410c", 1.4),
    "open_clip_compiled_": ("open_clip, compiled", "#f59f5a", 1.4),
    "materialised_": ("logits held once", "#7c5cbf", 1.4),
    "inf_cl_": ("Inf-CL's algorithm", "#868e96", 1.4),
}
LOSSES = {"clip": "CLIP", "siglip": "SigLIP"}


@dataclass(frozen=True)
class Kind:
    """What is drawn against the batch."""

    metric: str
    label: str
    unit: float
    """By which values are divided."""


KINDS = {
    "time": Kind("forward_backward_seconds", "seconds", 1.0),
    "memory": Kind("extra_memory_bytes", "peak extra memory, MB", 1e6),
}
Curves = dict[str, dict[str, list[tuple[int, float]]]]
"""Loss -> prefix of a side -> (B, value) by rising B."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a picture is not fresh")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    asked = parser.parse_args(argv)
    wanted = drawn(asked.results)
    if asked.check:
        stale = compare(wanted, asked.pictures)
        print("\n".join(f"{name} is not what the results show: python -m benchmarks.pictures" for name in stale))
        return int(bool(stale))
    asked.pictures.mkdir(parents=True, exist_ok=True)
    for name, content in wanted.items():
        (asked.pictures / name).write_bytes(content)
        print(asked.pictures / name)
    return 0


def compare(wanted: dict[str, bytes], pictures: Path) -> list[str]:
    """Names of pictures that are missing, differ, or have no results any more."""
    there = {path.name: path.read_bytes() for path in pictures.glob("loss_*.svg")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def drawn(results: Path) -> dict[str, bytes]:
    """Every picture by file name: two for each device that has results."""
    found = {}
    for path in sorted([*results.glob("loss_cpu.json"), *results.glob("gpu_*.json")]):
        content = json.loads(path.read_text())
        device = content["header"]["device"]
        for name, kind in KINDS.items():
            if lines := curves(content["records"], kind):
                found[f"loss_{name}_{device}.svg"] = draw(lines, kind, content["header"])
    return found


def curves(records: Sequence[dict[str, Any]], kind: Kind) -> Curves:
    """Of the narrowest features in the device's first dtype."""
    pattern = re.compile(r"(clip|siglip) B=(\d+) d=512 (float32|bfloat16)")
    found: Curves = defaultdict(lambda: defaultdict(list))
    for record in records:
        case, metric = pattern.fullmatch(record["case"]), record["metric"]
        side = metric.removesuffix(kind.metric)
        if case and metric.endswith(kind.metric) and side in SIDES:
            found[case[1]][side].append((int(case[2]), record["value"] / kind.unit))
    return {loss: {side: sorted(points) for side, points in sides.items()} for loss, sides in found.items()}


def draw(lines: Curves, kind: Kind, header: dict[str, Any], file_format: str = "svg") -> bytes:
    """One panel a loss."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}):
        figure = Figure(figsize=(8.4, 3.6), layout="constrained")
        panels = figure.subplots(1, len(lines), squeeze=False, sharey=True)[0]
        for panel, loss in zip(panels, sorted(lines), strict=True):
            _panel(panel, lines[loss], kind, LOSSES[loss])
        figure.suptitle("Loss, forward and backward: " + _where(header), fontsize=9, color="#495057")
        content = io.BytesIO()
        plain = {"Date": None, "Creator": None} if file_format == "svg" else None
        figure.savefig(content, format=file_format, metadata=plain, dpi=120)
    return content.getvalue()


def _panel(panel: Axes, sides: dict[str, list[tuple[int, float]]], kind: Kind, title: str) -> None:
    for side, (name, colour, width) in SIDES.items():
        if side in sides:
            sizes, values = zip(*sides[side], strict=True)
            panel.plot(sizes, values, label=name, color=colour, linewidth=width, marker="o", markersize=4)
    every = sorted({size for points in sides.values() for size, _ in points})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(every, [f"{size // 1024}k" if size >= 1024 else str(size) for size in every])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set(title=title, xlabel="pairs in the batch", ylabel=kind.label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)


def _where(header: dict[str, Any]) -> str:
    machine = header["gpu"] or f"{header['cpu']}, {header['threads']} threads"
    state = " with changes" if header["dirty"] else ""
    return f"d = 512, {machine}, torch {header['versions']['torch']}, commit {header['commit']}{state}"


if __name__ == "__main__":
    sys.exit(main())
