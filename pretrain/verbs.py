"""What each verb takes from the command line, and the one function it calls."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from pretrain.errors import UserError
from pretrain.show import show
from pretrain.verbs_checkpoint import checkpoint
from pretrain.verbs_data import index, pack
from pretrain.verbs_doctor import doctor
from pretrain.verbs_drill import drill, faults
from pretrain.verbs_evaluate import evaluate
from pretrain.verbs_export import export
from pretrain.verbs_launch import launch
from pretrain.verbs_plan import plan
from pretrain.verbs_ranks import ranks
from pretrain.verbs_report import report
from pretrain.verbs_runs import compare, status
from pretrain.verbs_search import embed, search

__all__ = [
    "bench", "checkpoint", "compare", "doctor", "drill", "embed", "evaluate", "export",
    "index", "launch", "pack", "plan", "ranks", "report", "search", "show", "status", "train",
]  # fmt: skip


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
