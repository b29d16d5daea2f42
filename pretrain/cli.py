"""The `pretrain` command: a verb, and what follows it. Nothing heavy is imported before the verb is known."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import nullcontext, suppress
from typing import NoReturn

from pretrain import __version__, errors
from pretrain.signals import armed

VERBS = {
    "train": "train a dual encoder, or go on with it: CONFIG [--section.key value] [--profile A..B] [--replay STEP]",
    "evaluate": "measure a run, checkpoint or export on held-out shards: evaluate RUN --task zero_shot|retrieval",
    "export": "write the encoders for another library, proven: export RUN OUT --to open_clip|transformers|onnx|...",
    "embed": "features of all images and captions of shards: embed MODEL SHARDS OUT [--tower image|text]",
    "search": "what lies nearest: search OUT --text TEXT | --image FILE [--include SET] [--exclude SET] [--html PAGE]",
    "pack": "make WebDataset shards: pack folder DIR OUT | table FILE OUT | shards SHARDS OUT | digits OUT",
    "index": "build the shards' offset indexes, or check the shards: index SHARDS... [--check] [--report PAGE]",
    "drill": "put a small run through faults, kills first: drill [--only PATTERN] [--ranks 2] [--short]",
    "plan": "predict memory, time and cost: plan CONFIG --gpus W --gpu h100|... [--nodes N] [--picture FILE] [--json]",
    "doctor": "look over machine, ranks and config without training: doctor [CONFIG] [--only CHECK...] [--json]",
    "checkpoint": "look into checkpoints: checkpoint inspect RUN|STEP | verify RUN|STEP | consolidate STEP OUT",
    "ranks": "where every rank of a run is, or how it ended: ranks RUN [--json] [--trace]",
    "status": "how far runs are, how fast, what went wrong: status RUN... [--json] [--watch [SECONDS]]",
    "compare": "what differs between runs: knobs, versions, losses, speed, results: compare RUN RUN... [--json]",
    "report": "write one HTML file about runs, with pictures of held-out pairs: report RUN [RUN...] [--out FILE]",
    "launch": "start a run on a cluster or in a cloud: launch LAUNCHER CONFIG [--nodes N ...] [--dry-run]",
    "bench": "measure beside open_clip what the README quotes: bench loss|step|overlap [--json], in a checkout",
}

STOPPABLE = ("train", "evaluate", "embed")
"""Verbs that a signal ends in order; the others just end, and the same command goes on where they were."""


def main() -> NoReturn:
    """Run a verb and exit: 0 done, 2 the user's mistake, 85 stopped with a checkpoint saved, 1 anything else."""
    _show_choices()
    ending = [errors.FAILURE]  # where an exception leaves, whose traceback comes before
    # Registered before any library, so it comes after theirs; see below.
    atexit.register(lambda: _leave(ending[0]))
    try:
        ending[0] = run(sys.argv[1:])
    except SystemExit as parsed:  # --help has been printed
        ending[0] = parsed.code if isinstance(parsed.code, int) else errors.FAILURE
    sys.exit(ending[0])


def _leave(code: int) -> None:
    """End one rank of several without tearing the interpreter down.

    A gloo group that anything still refers to keeps its threads, and C++ then ends the process with SIGABRT in place
    of its exit code (seen with torch 2.13: "terminate called without an active exception"). It also takes seconds,
    out of a scheduler's grace time, to free what the system frees at once.
    """
    if os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) == "1":
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def run(argv: list[str]) -> int:
    """The exit code of a command line; the first rank alone tells what went wrong."""
    verb, args = (argv or ["help"])[0], argv[1:]
    try:
        _do(verb, args)
    except errors.UserError as mistake:
        _tell(f"pretrain {verb}: {mistake}")
        return errors.USER_ERROR
    except errors.RanksLost as lost:
        print(f"pretrain {verb}: {lost}", file=sys.stderr, flush=True)  # by every rank: the first may be gone
        return errors.FAILURE
    except (errors.ProcessDied, errors.RunFailed) as died:
        _tell(f"pretrain {verb}: {died}")
        return errors.FAILURE
    except errors.Stopped as stopped:
        _tell(f"pretrain {verb}: {stopped}")
        return errors.REQUEUE
    except KeyboardInterrupt:
        _tell(f"pretrain {verb}: interrupted")
        return errors.FAILURE
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return errors.DONE


def _do(verb: str, args: list[str]) -> None:
    if verb in ("-h", "--help", "help"):
        print(_overview(), flush=True)
    elif verb in ("-V", "--version"):
        print(__version__)
    elif verb not in VERBS:
        raise errors.UserError(f"there is no such verb; one of {', '.join(VERBS)}")
    else:
        # Before the slow imports: a signal that comes during them counts, and kills nothing by its default.
        with armed() if verb in STOPPABLE else nullcontext():
            from pretrain import verbs

            getattr(verbs, verb)(args)


def _overview() -> str:
    lines = [f"pretrain {__version__}: pretraining of CLIP and SigLIP style dual encoders", ""]
    lines += [f"  pretrain {verb:9} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [*lines, "", "pretrain VERB --help tells its options. Exit codes: 0 done, 2 your mistake, 85 restart me."]
    )


def _show_choices() -> None:
    """What the program chose by itself (exchange, form of the kernels) is said, with its reason, by the first rank."""
    if _is_first():
        logger = logging.getLogger("pretrain")
        logger.setLevel(logging.INFO)
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.propagate = False  # libraries give the root logger a handler of their own


def _tell(line: str) -> None:
    if _is_first():
        print(line, file=sys.stderr, flush=True)


def _is_first() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
