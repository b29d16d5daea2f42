"""The state of runs, for a person: one in full, or a line for each of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pretrain.history.starts import UNKNOWN
from pretrain.history.status import Status
from pretrain.show import age, columns, duration

NAMED = 5
"""Restarts and faults that are told one by one."""


def one(status: Status) -> list[str]:
    """A run in full, a line a fact."""
    rows = [
        ("state", _state(status)),
        ("progress", _progress(status)),
        ("speed", _speed(status)),
        ("checkpoint", _saved(status)),
    ]
    rows += [("restarts" if not n else "", line) for n, line in enumerate(_restarts(status))]
    rows += [("faults" if not n else "", line) for n, line in enumerate(_faults(status))]
    return [status.run, *(f"  {name:11} {line}" for name, line in rows)]


def several(statuses: Sequence[Status]) -> list[str]:
    """A line a run, below a heading."""
    head = ["run", "state", "step", "done", "loss", "samples/s", "wait", "left", "saved", "restarts", "faults"]
    return columns([head, *(_row(status) for status in statuses)], right=range(2, len(head)))


def _row(status: Status) -> list[str]:
    done, (step, steps) = status.progress, status.steps
    left = "-" if status.life.is_over else duration(done.left_s)
    share = "-" if not done.total_samples else f"{done.samples / done.total_samples:.1%}"
    wait = "-" if done.data_wait is None else f"{done.data_wait:.0%}"
    speed = "-" if done.samples_per_s is None else f"{done.samples_per_s:,.0f}"
    loss = "-" if done.loss is None else f"{done.loss:.4f}"
    saved = f"{status.saves.steps[-1]:,}" if status.saves.steps else "-"
    row = [status.run, status.life.state, f"{step:,}" + (f"/{steps:,}" if steps else ""), share, loss, speed]
    return [*row, wait, left, saved, str(status.restarts), str(status.faults)]


def _state(status: Status) -> str:
    alive = status.life
    latest = status.events.starts[-1].facts if status.events.starts else {}
    ranks = latest.get("ranks") or alive.ranks
    how = ", ".join(str(latest[name]) for name in ("device", "engine", "exchange") if latest.get(name))
    parts = [alive.state + (f": {alive.detail}" if alive.detail else "")]
    hosts = ", ".join(alive.hosts[:4]) or "unknown hosts"
    where = f"{ranks} rank{'s' * (ranks != 1)} on {hosts}" + (f" ({how})" if how else "")
    parts += [where] * (ranks > 0)
    parts += [f"last sign {age(alive.age_s)} ago"] * (alive.age_s is not None)
    return "; ".join(parts)


def _progress(status: Status) -> str:
    done, (step, steps) = status.progress, status.steps
    parts = [f"step {step:,}" + (f" of {steps:,}" if steps else ""), f"{done.samples:,} samples"]
    if done.total_samples:
        parts[-1] += f" of {done.total_samples:,} ({done.samples / done.total_samples:.1%})"
    parts += [] if done.epoch is None else [f"epoch {done.epoch:.2f}"]
    parts += [] if done.loss is None else [f"loss {done.loss:.4f}"]
    parts += [] if status.life.is_over else [f"left {duration(done.left_s)}"]
    return ", ".join(parts)


def _speed(status: Status) -> str:
    done = status.progress
    if done.samples_per_s is None or done.step_s is None:
        return "no step is logged yet"
    parts = [f"{done.samples_per_s:,.0f} samples/s in the last steps"]
    parts += [] if status.samples_per_s is None else [f"{status.samples_per_s:,.0f} since the first start"]
    parts += [f"{done.step_s:.3g} s a step"] + ([] if done.data_wait is None else [f"data wait {done.data_wait:.0%}"])
    if status.goodput is not None:
        parts += [f"goodput {status.goodput:.0%} of {duration(status.wall_s)}"]
    return ", ".join(parts)


def _saved(status: Status) -> str:
    saves = status.saves
    if not saves.steps:
        return saves.problem or "none is finished yet"
    size = "" if saves.bytes is None else f", {saves.bytes / 1e6:,.1f} MB"
    others = f"; {len(saves.steps)} kept, from step {saves.steps[0]:,} on" if len(saves.steps) > 1 else ""
    ahead = status.progress.step - saves.steps[-1]
    since = f"; {ahead:,} steps since" if ahead > 0 else ""
    told = f"step {saves.steps[-1]:,} ({saves.newest}{size}){others}{since}"
    return told + (f"; PROBLEM: {saves.problem}" if saves.problem else "")


def _restarts(status: Status) -> Iterator[str]:
    again = status.events.starts[1:]
    if not again:
        yield "none" if not status.restarts else f"{status.restarts}, of which no event was left"
        return
    yield f"{len(again)}, {status.lost_steps:,} steps lost" + (
        " at least" if any(start.lost_steps is None for start in again) else ""
    )
    for start in again[-NAMED:]:
        lost = "" if not start.lost_steps else f"; {start.lost_steps:,} steps again"
        yield f"{start.time[:19]} from step {start.step:,}: {start.reason or UNKNOWN}{lost}"


def _faults(status: Status) -> Iterator[str]:
    if not status.faults:
        yield "none"
        return
    events, found = status.events, status.progress
    if found.skipped:
        yield f"{found.skipped:,} samples replaced ({found.skipped / max(found.samples, 1):.2%}): skips.jsonl"
    if status.damage:
        yield f"{status.damage:,} notes of damaged shards: skips.jsonl"
    if events.steps_skipped:
        last = events.steps_skipped[-1]
        yield f"{len(events.steps_skipped):,} steps left out, the last one {last['step']:,}: {last['reason']}"
    for back in events.rewinds[-NAMED:]:
        yield f"{back['time'][:19]} gone back from step {back['step']:,} to {back['to']:,}"
    for differ in events.weights_differ[-NAMED:]:
        yield f"after step {differ['step']:,} weights of ranks {differ['ranks']} differed in {differ['parameter']}"
    for stall in status.standstills[-NAMED:]:
        yield f"{str(stall.get('time'))[:19]} stood still: {'; '.join(map(str, stall.get('lines', ())))}"
    if status.saves.problem:
        yield f"checkpoint: {status.saves.problem}"
