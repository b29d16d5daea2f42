"""What each verb takes from the command line, and the one function it calls."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from pretrain import flags
from pretrain.errors import UserError
from pretrain.show import show
from pretrain.verbs_checkpoint import checkpoint
from pretrain.verbs_data import index, pack
from pretrain.verbs_doctor import doctor
from pretrain.verbs_drill import drill, faults
from pretrain.verbs_export import export
from pretrain.verbs_launch import launch
from pretrain.verbs_plan import plan
from pretrain.verbs_ranks import ranks
from pretrain.verbs_runs import compare, status

__all__ = [
    "bench", "checkpoint", "compare", "doctor", "drill", "evaluate", "export",
    "index", "launch", "pack", "plan", "ranks", "show", "status", "train",
]  # fmt: skip

Average = Literal["auto", "yes", "no"]
_AVERAGE: dict[Average, bool | None] = {"auto": None, "yes": True, "no": False}


def train(args: list[str]) -> None:
    """`pretrain train CONFIG [--section.key value] [--print-config] [--profile A..B] [--replay STEP]`."""
    from pretrain import runfile
    from pretrain.guard import asked
    from pretrain.profiling import window
    from pretrain.signals import armed

    show, args = "--print-config" in args, [arg for arg in args if arg != "--print-config"]
    steps, args = window.take_from(args)
    again, args = asked.step_of(args)
    named = bool(args) and not args[0].startswith("-")
    with faults(), armed() as stop:
        run = runfile.load(args[0] if named else None, args[named:])
        if show:
            print(runfile.dump(run), end="")
            return
        stop.choose(run.train.stop_signal)
        if again is not None:
            from pretrain.guard.replay import replay

            replay(run, again)
            return
        from pretrain.train import train

        train(run, stop, steps)


def evaluate(args: list[str]) -> None:
    """`pretrain evaluate RUN --task ...`, alone or under torchrun; a signal ends it with 85, and nothing is lost."""
    from pretrain.signals import armed

    with armed(), faults():
        flags.command(_evaluate, args, "pretrain evaluate")


def _evaluate(
    source: Positional[str],
    /,
    *,
    task: Literal["zero_shot", "retrieval"],
    data: tuple[str, ...] = (),
    classes: str | None = None,
    average: Average = "auto",
    batch_size: int = 256,
    workers: int = 2,
    timeout_s: float = 600.0,
    json: bool = False,
) -> None:
    """Measure the encoders of a run on held-out shards, on all ranks that were started.

    Args:
        source: Run folder or checkpoint folder.
        task: What to measure.
        data: Held-out shards; default: the run's data.eval.
        classes: For zero_shot, class names and templates; default: classes.json above the shards.
        average: Use the averaged (EMA) weights; auto: where there are any.
        batch_size: Pairs per rank and forward.
        workers: Decoding processes per rank.
        timeout_s: Seconds that ranks wait for each other; none may give no sign for six times as long.
        json: Print one JSON object instead of a table.
    """
    from pretrain.evaluate import evaluate
    from pretrain.signals import armed, interruptible
    from pretrain.watch.watcher import watching_ranks
    from pretrain.world import join

    if not 0 < timeout_s < float("inf"):
        raise UserError(f"--timeout-s {timeout_s} must be a positive number of seconds, 600 for instance")
    with armed() as stop, watching_ranks(timeout_s) as watch, join(timeout_s) as world, interruptible(world.size == 1):
        if watch is not None:
            stop.before_leaving = watch.end
        how = partial(evaluate, source, task, average=_AVERAGE[average], world=world, watch=watch)
        result = how(data=data, classes=classes, batch_size=batch_size, workers=workers)
        if world.is_main:
            show(result, json)


BENCHES = {
    "loss": "time, memory and error of the losses, beside their peers",
    "step": "a whole training step, beside open_clip's",
    "data": "loading of shards, beside open_clip's: speed, pixels, indexes, memory",
    "overlap": "how much of each exchange hides behind compute, over emulated links",
}


def bench(args: list[str]) -> None:
    """`pretrain bench loss|step|data|overlap [...]`: benchmarks/NAME.py of the checkout that this package lies in."""
    name, *rest = args or ["nothing"]
    if name in ("-h", "--help"):
        print("\n".join(f"pretrain bench {name:8} {what}" for name, what in BENCHES.items()))
        return
    if name not in BENCHES:
        raise UserError(f"bench {name}: name what to measure, one of {', '.join(BENCHES)}")
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / f"{name}.py").exists():
        raise UserError(
            f"bench {name}: there is no benchmarks/{name}.py beside {root / 'pretrain'}, and a wheel has none: "
            "clone the repository and run `pip install -e .` there"
        )
    sys.path.insert(0, str(root))
    importlib.import_module(f"benchmarks.{name}").main(rest)
