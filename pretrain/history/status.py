"""Everything that a run's folder says of the run at this moment."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.history import folder, life, lines, progress, saves, starts
from pretrain.history.life import Life
from pretrain.history.progress import Progress
from pretrain.history.saves import Saves
from pretrain.history.starts import Events


@dataclass(frozen=True)
class Status:
    """A run at one moment."""

    run: str
    """Its folder."""
    life: Life
    progress: Progress
    saves: Saves
    events: Events
    wall_s: float | None
    """Seconds since the first start: up to now, or up to the last sign of a run that is over."""
    standstills: tuple[lines.Record, ...]
    """The last reports of ranks that kept the others waiting, oldest first."""
    damage: int
    """Notes of what is wrong with whole shards."""

    @property
    def goodput(self) -> float | None:
        """Share of the time since the first start that went into steps that count."""
        return min(1.0, self.progress.training_s / self.wall_s) if self.wall_s else None

    @property
    def samples_per_s(self) -> float | None:
        """Over all the time since the first start, whatever it was spent on."""
        return self.progress.samples / self.wall_s if self.wall_s else None

    @property
    def steps(self) -> tuple[int, int | None]:
        """Those done, and those of the whole run."""
        done, total = self.progress, self.progress.total_samples
        return done.step, None if total is None or not done.samples else round(total * done.step / done.samples)

    @property
    def restarts(self) -> int:
        """Starts but for the first."""
        return max(len(self.events.starts), self.life.attempts, 1) - 1

    @property
    def lost_steps(self) -> int:
        """Steps that were done again, or left behind by going back, as far as anybody wrote it down."""
        again = sum(start.lost_steps or 0 for start in self.events.starts)
        return again + sum(int(back["step"]) - int(back["to"] or 0) for back in self.events.rewinds)

    @property
    def faults(self) -> int:
        """Things that somebody should look at."""
        events = self.events
        found = len(events.steps_skipped) + len(events.rewinds) + len(events.weights_differ) + len(self.standstills)
        return found + self.progress.skipped + self.damage + (self.saves.problem is not None)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        told = asdict(self) | {"goodput": self.goodput, "samples_per_s": self.samples_per_s, "steps": self.steps[1]}
        told["progress"] |= {"left_s": None if self.life.is_over else self.progress.left_s}
        return told | {"restarts": self.restarts, "lost_steps": self.lost_steps, "faults": self.faults}


def read(run: Path, now: float | None = None) -> Status:
    """The state of the run in a folder, which may be written meanwhile.

    Args:
        now: seconds since 1970.

    Raises:
        UserError: it is no run folder, or its config is no YAML.
    """
    now = now or time.time()
    config, alive, events = folder.config(folder.check(run)), life.read(run, now), starts.read(run)
    latest: Mapping[str, Any] = events.starts[-1].facts if events.starts else {}
    shown = None if alive.is_over else alive.step
    done = progress.read(run, config, latest.get("total_samples"), shown)
    stalls = lines.tail(run / "stalls.jsonl")
    return Status(
        run=str(run),
        life=_finished(alive, done),
        progress=done,
        saves=saves.read(run, config),
        events=events,
        wall_s=_wall_s(events, alive, now),
        standstills=tuple(stalls[-5:]),
        damage=_damage(run / "skips.jsonl"),
    )


def _finished(alive: Life, done: Progress) -> Life:
    """A run without heartbeats, as a copy is, has finished where its last step is done."""
    over = not alive.ranks and done.samples and done.samples == done.total_samples
    return replace(alive, state="finished", detail="") if over else alive


def _wall_s(events: Events, alive: Life, now: float) -> float | None:
    if not events.starts:
        return None
    ends = [moment for moment in (alive.last_sign, events.last) if moment is not None]
    end = max(ends) if alive.is_over or alive.state == "silent" else life.stamp(now)
    return max(0.0, starts.seconds_between(events.starts[0].time, max(end, events.starts[0].time)))


def _damage(skips: Path) -> int:
    """Lines about whole shards have the index -1, and come first."""
    found = 0
    for record in lines.objects(lines.whole(skips)):
        if record.get("index") != -1:
            break
        found += 1
    return found
