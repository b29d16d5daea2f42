"""The checks, one after the other, on all ranks at once; a rank that hangs or dies in one ends all, and is named."""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain import runfile
from pretrain.checks import check_world
from pretrain.config import Run
from pretrain.doctor import judge, report
from pretrain.doctor.base import Check, Finding, Patient
from pretrain.errors import FAILURE, RanksLost, UserError
from pretrain.world import World, environment

SLACK_S = 10.0
"""What the others wait longer for a rank than it has itself, which then tells in which check it was."""


class RanksMissing(RanksLost):
    """Ranks that did not come out of a check."""

    def __init__(self, message: str, nodes: Sequence[str]) -> None:
        super().__init__(message)
        self.nodes = tuple(nodes)
        """Where they were; empty where that cannot be told, or where it would be all nodes."""


def examine(world: World, words: Sequence[str], checks: Sequence[Check], limit_s: float) -> report.Report:
    """Every check on every rank. Collective.

    Args:
        words: a config and flags after it, as for `pretrain train`; none: the machine alone is looked at.
        limit_s: longest that a check may take.

    Raises:
        RanksMissing: a rank did not come out of a check in time.
    """
    world = world.apart()
    nodes = tuple(world.share(node_name()))
    run, of_config = read(words, world.size)
    patient = Patient(world, nodes, run)
    mine = [("config", finding) for finding in of_config]
    for check in checks:
        if (words or not check.config) and (world.is_main or not check.once):
            with limited(check.name, patient, limit_s):
                mine += [(check.name, finding) for finding in look(check, patient)]
        meet(check.name, patient, limit_s)
    told = world.share(mine)
    names = {finding.name: check for of_rank in told for check, finding in of_rank}
    found = judge.judged([[finding for _, finding in of_rank] for of_rank in told])
    return report.Report(
        report.lines(found, nodes, _ordered(names, checks)), nodes, tuple(judge.bad_nodes(found, nodes, names))
    )


def read(words: Sequence[str], ranks: int) -> tuple[Run | None, list[Finding]]:
    """The run that a config names, and what is to be said of it: on one node the file may be missing."""
    if not words:
        return None, []
    needed, mend = f"a run that {ranks} rank(s) can make", "mend it, or mount the folder it lies in on this node"
    try:
        run = runfile.load(words[0], list(words[1:]))
        check_world(run, ranks)
    except UserError as mistake:
        return None, [Finding("config file", str(mistake), "fail", needed, mend)]
    return run, [Finding("config file", words[0], "ok", needed)]


def look(check: Check, patient: Patient) -> Iterator[Finding]:
    """A check's findings; what it raises is one. Nothing where it is of a config that this rank could not read."""
    if check.config and patient.config is None:
        return
    try:
        yield from check.look(patient)
    except UserError as mistake:
        yield Finding(check.name, str(mistake), "fail", check.needs, "see what it says")
    except Exception as error:
        if check.joint and patient.world.size > 1:
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield Finding(check.name, said, "fail", check.needs, "the check itself could not be made on this rank")


@contextmanager
def limited(name: str, patient: Patient, limit_s: float) -> Iterator[None]:
    """End this process with 1 where the block takes longer, even where it holds Python's lock and never lets go."""
    rank, node = patient.world.rank, patient.node

    def give_up() -> None:
        print(f"pretrain doctor: rank {rank} on {node} hangs in check {name} for {limit_s:g} s", file=sys.stderr)
        sys.stderr.flush()
        os._exit(FAILURE)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(limit_s + SLACK_S / 2, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def meet(name: str, patient: Patient, limit_s: float) -> None:
    """Wait until every rank has made a check.

    Raises:
        RanksMissing: some did not in time; the first rank says which.
    """
    if patient.world.size == 1:
        return
    wait = timedelta(seconds=limit_s + SLACK_S)
    try:
        dist.monitored_barrier(patient.world.group, wait, wait_all_ranks=True)
    except RuntimeError as error:
        raise missing(name, str(error), patient) from error


def missing(name: str, said: str, patient: Patient) -> RanksMissing:
    """Of gloo's words."""
    listed = re.search(r"Ranks? ([\d, ]+) failed", said) if patient.world.is_main else None
    ranks = [int(each) for each in listed[1].split(",")] if listed else []
    if not ranks:
        return RanksMissing(f"check {name}: not all ranks came out of it; the first one says which", ())
    told = ", ".join(f"rank {rank} on {patient.nodes[rank]}" for rank in ranks)
    bad = sorted({patient.nodes[rank] for rank in ranks})
    return RanksMissing(f"check {name}: {told} died or hangs in it", bad if len(bad) < len({*patient.nodes}) else ())


def refuse_crowding() -> None:
    """Before the ranks join, which takes a GPU for each.

    Raises:
        UserError: on every rank of a node that has too few.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
    local, count = max(local, environment()[2] + 1), torch.cuda.device_count()
    if torch.cuda.is_available() and local > count:
        raise UserError(
            f"{node_name()}: {local} ranks see {count} GPUs; start as many as there are GPUs (--gpus-per-node)"
        )


def node_name() -> str:
    """As the scheduler calls this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _ordered(names: dict[str, str], checks: Sequence[Check]) -> dict[str, str]:
    """In the order of the checks, on whatever rank a name was met first."""
    order = ["config", *(check.name for check in checks)]
    return dict(sorted(names.items(), key=lambda item: order.index(item[1])))
