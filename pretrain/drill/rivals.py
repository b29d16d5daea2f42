"""Two starts of one run at the same time."""

from __future__ import annotations

import signal

from pretrain.drill.ranks import LONGEST_S
from pretrain.drill.scripts import FAILED, REFUSED
from pretrain.drill.trial import Script, Trial


def second_start(trial: Trial) -> None:
    """The first start stands still; a second one must be refused, and the first one ends undisturbed."""
    with trial.start("pause@backward:step=5:rank=0") as first:
        trial.must(first.until_paused(0), "the first start did not come to stand still")
        with trial.start() as second:
            trial.expect(second, {"others": REFUSED})
            trial.must("is being trained by" in second.said(0), "the second start did not say who trains the run")
        first.send(signal.SIGCONT)
        trial.expect(first)


def zombie(spec: str) -> Script:
    """A start stands still, its lock is lost, as on a machine that is cut off; another one finishes; then it wakes.

    It must end without having changed anything.
    """

    def script(trial: Trial) -> None:
        # Its other ranks must wait for it until the later start is through, however slow the machine is.
        with trial.start(spec, "--train.timeout-s", f"{LONGEST_S:g}") as first:
            trial.must(first.until_paused(0), f"{spec} did not happen")
            for lock in trial.run_folder.glob("**/.lock"):
                lock.unlink()  # a new file has a lock of its own
            trial.finish()
            first.send(signal.SIGCONT)
            trial.expect(first, {"others": (*FAILED, *REFUSED)})
            trial.must(
                "followed by attempt" in first.said(0), "the earlier start did not say that a later one has taken over"
            )

    return script
