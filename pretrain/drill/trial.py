"""One fault tried on one run: starts, what became of them, and whether the run came to its true end."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.drill import outcome
from pretrain.drill.ranks import GRACE_S, Ranks
from pretrain.errors import UserError

STEPS, EVERY, BATCH, NAME = 12, 3, 16, "drilled"
"""Steps of the run, steps from one checkpoint to the next, pairs of a batch at the least, the run's name."""
_CONFIG = Path(__file__).parents[1] / "configs" / "debug.yaml"
_FLAGS = (
    *(
        "--name",
        NAME,
        "--checkpoint.every-steps",
        f"{EVERY}",
        "--checkpoint.keep-last",
        "2",
        "--optim.ema-decay",
        "0.9",
    ),
    *("--train.timeout-s", "20"),
)
_ALL_DONE: Mapping[str, Collection[str]] = {"others": ("done",)}


@dataclass(frozen=True)
class Setting:
    """What all runs of a drill have in common."""

    size: int
    """Ranks."""
    engine: str
    folder: Path
    """Gets a folder for each fault."""

    @property
    def length(self) -> tuple[str, ...]:
        """Knobs of the batch, which the ranks must be able to share, and of the samples in it."""
        batch = math.ceil(BATCH / self.size) * self.size
        return "--train.samples", f"{STEPS * batch}", "--train.global-batch", f"{batch}"


@dataclass
class Trial:
    """A run that a fault is tried on."""

    setting: Setting
    name: str
    flags: tuple[str, ...] = ()
    """Knobs that the run differs in from the undisturbed one, none of which may change a result."""
    problems: list[str] = field(default_factory=list)
    """What was not as it should be, a line each."""
    ends: list[str] = field(default_factory=list)
    """How the ranks of each start ended."""

    starts: int = 0

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        for old in (self.folder, *self.setting.folder.glob(f"said/{self.name}-[0-9]*")):
            shutil.rmtree(old, ignore_errors=True)

    @property
    def folder(self) -> Path:
        return self.setting.folder / self.name

    @property
    def run_folder(self) -> Path:
        return self.folder / NAME

    @property
    def size(self) -> int:
        return self.setting.size

    @property
    def took_s(self) -> float:
        """Seconds since the trial began."""
        return time.monotonic() - self._began

    def start(self, fault: str = "", *flags: str, fresh: bool = False) -> Ranks:
        """The ranks of a further start, running; use it as a context manager."""
        words = ["train", str(_CONFIG), "--folder", str(self.folder), "--engine", self.setting.engine]
        self.starts += 1
        logs = self.setting.folder / "said" / f"{self.name}-{self.starts}"
        return Ranks([*words, *_FLAGS, *self.setting.length, *self.flags, *flags], logs, self.size, fault, fresh)

    def expect(
        self, ranks: Ranks, wanted: Mapping[str, Collection[str]] = _ALL_DONE, grace_s: float = GRACE_S
    ) -> list[str]:
        """Wait for the ends of a start, and note what is not as wanted.

        Args:
            wanted: words of `ranks.WORDS` for 'rank_N'; 'others' for the ranks that are not named.
            grace_s: how long ranks may outlive one that has failed.
        """
        ends = ranks.wait(grace_s)
        self.ends.append("+".join(ends) if len(set(ends)) > 1 else ends[0])
        for rank, end in enumerate(ends):
            allowed = wanted.get(f"rank_{rank}", wanted["others"])
            if end not in allowed:
                lines = ranks.said(rank).strip().splitlines() or ["it said nothing"]
                told = f"rank {rank} ended as {end}, not {' or '.join(allowed)}: {lines[-1][:300]}"
                self.problems.append(f"start {len(self.ends)}: {told}")
        return ends

    def must(self, holds: bool, otherwise: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(otherwise)

    def finish(self) -> None:
        """Start again without a fault: the run must come to its end at once."""
        with self.start() as ranks:
            self.expect(ranks)

    def compare(self, expected: Trial) -> str:
        """'equal' where the run has the bits and the losses of another one, 'different' (and a problem) otherwise."""
        try:
            found = outcome.fingerprint(self.run_folder, STEPS)
            differs = outcome.difference(found, outcome.fingerprint(expected.run_folder, STEPS))
            if differs is None and outcome.history(self.run_folder) != outcome.history(expected.run_folder):
                differs = "metrics.jsonl is not the undisturbed run's"
        except (UserError, OSError) as error:
            differs = str(error)
        self.must(differs is None, str(differs))
        return "equal" if differs is None else "different"


Script = Callable[[Trial], None]
"""What is done to a run; it notes what is not as it should be."""
