"""What is done to a run, in the forms that most faults share."""

from __future__ import annotations

import signal
import time
from collections.abc import Collection

from pretrain.drill.acts import ACTS
from pretrain.drill.ranks import Ranks
from pretrain.drill.spec import parse
from pretrain.drill.trial import Script, Trial

Ends = Collection[str]
KILLED, FAILED, REFUSED, SAVED, DONE = ("SIGKILL",), ("failed",), ("refused",), ("saved",), ("done",)


def injected(spec: str, ends: Ends, others: Ends | None = None, says: str = "") -> Script:
    """A start with PRETRAIN_FAULT, then a start without.

    Args:
        ends: how the ranks that the spec names must end; others: the others, where it names one.
        says: what some rank must have said.
    """

    def script(trial: Trial) -> None:
        with trial.start(spec) as ranks:
            found = trial.expect(ranks, wanted(spec, ends, others))
            check(trial, ranks, spec, says)
        if set(found) != {"done"}:
            trial.finish()

    return script


def chain(*specs: str) -> Script:
    """A run that is killed at every start, each time elsewhere."""

    def script(trial: Trial) -> None:
        for spec in specs:
            with trial.start(spec) as ranks:
                trial.expect(ranks, wanted(spec, KILLED, FAILED))
                check(trial, ranks, spec)
        trial.finish()

    return script


def paused(spec: str, seconds: float) -> Script:
    """A rank stands still for a while, and everybody waits for it."""

    def script(trial: Trial) -> None:
        with trial.start(spec) as ranks:
            trial.must(ranks.until_paused(victim(spec)), f"{spec} did not happen")
            time.sleep(seconds)
            ranks.send(signal.SIGCONT)
            trial.expect(ranks)

    return script


def paused_for_ever(spec: str, timeout_s: int) -> Script:
    """A rank stands still, and the others must end by themselves within train.timeout_s; then it is killed."""

    def script(trial: Trial) -> None:
        with trial.start(spec, "--train.timeout-s", str(timeout_s)) as ranks:
            trial.must(ranks.until_paused(victim(spec)), f"{spec} did not happen")
            stood = time.monotonic()
            trial.expect(ranks, wanted(spec, KILLED, FAILED), grace_s=2.0)
            took = time.monotonic() - stood
            trial.must(ranks.abandoned == {victim(spec)}, f"ranks {sorted(ranks.abandoned)} did not end by themselves")
            trial.must(took < timeout_s + 5, f"the others went on for {took:.0f} s, train.timeout_s is {timeout_s}")
        trial.finish()

    return script


def told_while_starting(number: signal.Signals) -> Script:
    """A user's own start (no fork of the drill) is told to stop as soon as it can hear it: while it imports."""

    def script(trial: Trial) -> None:
        with trial.start(fresh=True) as ranks:
            heard = all(ranks.until_catches(rank, number) for rank in range(trial.size))
            trial.must(heard, f"{number.name} is not waited for")
            ranks.send(number)
            trial.expect(ranks, {"others": SAVED})
        trial.finish()

    return script


def wanted(spec: str, ends: Ends, others: Ends | None) -> dict[str, Ends]:
    """How a start must end, for `Trial.expect`: the rank that a spec names like this, the others like that."""
    rank = parse(spec, ACTS)[0].rank
    return {"others": ends} if rank is None else {f"rank_{rank}": ends, "others": others or ends}


def victim(spec: str) -> int:
    """The rank that a spec names."""
    rank = parse(spec, ACTS)[0].rank
    assert rank is not None, spec
    return rank


def check(trial: Trial, ranks: Ranks, spec: str, says: str = "") -> None:
    """After a start's end: its fault came about, was told, and left no rank behind."""
    trial.must(any(map(ranks.happened, range(trial.size))), f"{spec} did not happen")
    trial.must(says in "".join(map(ranks.said, range(trial.size))), f"no rank said {says!r}")
    trial.must(not ranks.abandoned, f"ranks {sorted(ranks.abandoned)} did not end by themselves")
