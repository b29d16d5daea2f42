"""How runs are, in short, and what happened to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pretrain.history.starts import UNKNOWN
from pretrain.report.html import Html, join, table, tag
from pretrain.report.marks import SIGNS
from pretrain.report.ran import Ran
from pretrain.report.scales import short
from pretrain.show import duration

Row = tuple[str, ...]
MOST = 40
"""Of the newest events of a run."""
_GOOD, _BAD = ("finished", "running"), ("failed", "dead", "stalled")


def tiles(run: Ran) -> Html:
    """The state of one run."""
    cells = [tag("div", tag("dt", name), tag("dd", value, tag("small", more))) for name, value, more in _facts(run)]
    return tag("dl", *cells, class_="tiles")


def overview(runs: Sequence[Ran]) -> Html:
    """The states of several runs, a line each."""
    columns = [[(name, value) for name, value, _ in _facts(run)] for run in runs]
    heads = ["run", *(name.lower() for name, _ in columns[0])]
    rows = [[run.name, *(value for _, value in facts)] for run, facts in zip(runs, columns, strict=True)]
    return tag("div", table(heads, rows), class_="card")


def signs(runs: Sequence[Ran]) -> Html:
    """What the marks in the curves mean; nothing where there are none."""
    kinds = [kind for kind in SIGNS if any(mark.kind == kind for run in runs for mark in run.marks)]
    colors = {"skipped": "bad"}
    items = [
        tag("li", tag("span", SIGNS[kind][0], class_=colors.get(kind, "warn")), f" {SIGNS[kind][1]}") for kind in kinds
    ]
    return tag("ul", *items, class_="signs") if items else join([])


def happened(run: Ran) -> Html:
    """Events of a run, newest last."""
    rows = sorted(_events(run))
    if not rows:
        return tag("p", "Nothing went wrong, and the run was never started again.", class_="soft")
    left = f"The newest {MOST} of {len(rows):,} events." if len(rows) > MOST else None
    return tag("div", table(["time (UTC)", "step", "what", "why"], rows[-MOST:], left, "events"), class_="card")


def _facts(run: Ran) -> Iterator[tuple[str, Html, str]]:
    status, done = run.status, run.status.progress
    state = status.life.state
    kind = "good" if state in _GOOD else "bad" if state in _BAD else "warn"
    yield "State", tag("span", state, class_=kind), status.life.detail[:120]
    step, steps = status.steps
    share = f"{done.samples / done.total_samples:.0%}" if done.total_samples else "–"
    yield "Progress", join([share]), f"step {step:,}" + (f" of {steps:,}" if steps else "")
    yield "Loss", join([short(done.loss)]), f"at {short(done.samples)} samples"
    speed = f"goodput {status.goodput:.0%}" if status.goodput is not None else ""
    yield "Samples/s", join([short(status.progress.samples_per_s, 3)]), speed
    left = "" if status.life.is_over else f"left {duration(done.left_s)}"
    yield "Time", join([duration(status.wall_s)]), left
    lost = f"{status.lost_steps:,} steps lost" if status.restarts else ""
    yield "Restarts", join([str(status.restarts)]), lost
    faults = tag("span", f"{status.faults:,}", class_="bad" if status.faults else None)
    yield "Faults", faults, f"{done.skipped:,} samples replaced" if done.skipped else ""
    saves = status.saves.steps
    yield "Checkpoint", join([f"{saves[-1]:,}" if saves else "none"]), "newest step" if saves else ""


def _events(run: Ran) -> Iterator[Row]:
    events = run.status.events
    for start in events.starts[1:]:
        again = f"; {start.lost_steps:,} steps again" if start.lost_steps else ""
        yield _moment(start.time), f"{start.step:,}", "started again", (start.reason or UNKNOWN) + again
    for skip in events.steps_skipped:
        yield _moment(skip["time"]), f"{skip['step']:,}", "step left out", str(skip.get("reason"))
    for back in events.rewinds:
        yield _moment(back["time"]), f"{back['step']:,}", "gone back", f"to step {back.get('to') or 0:,}"
    for differ in events.weights_differ:
        words = f"ranks {differ.get('ranks')} in {differ.get('parameter')}"
        yield _moment(differ["time"]), f"{differ['step']:,}", "weights differed", words
    for stall in run.status.standstills:
        yield _moment(str(stall.get("time"))), "", "stood still", "; ".join(map(str, stall.get("lines", ())))


def _moment(iso: str) -> str:
    return iso[:19].replace("T", " ")
