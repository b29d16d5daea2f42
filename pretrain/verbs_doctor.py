"""`pretrain doctor`: alone, under torchrun or srun, or as the first step of a SLURM job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError
from pretrain.show import show

USAGE = """usage: pretrain doctor [CONFIG [--section.key value]] [--json] [--bad-nodes FOLDER]
                       [--only CHECK...] [--skip CHECK...] [--limit SECONDS]

Look over this machine and a config without training, on every rank that was started, and compare the ranks. Without
CONFIG: the machine alone. Ends with 2 on every rank where a check failed on any, with 1 where a rank died or hung.

  --json              one JSON object instead of a table
  --bad-nodes FOLDER  make an empty file there, named as the node, for each node that is itself at fault
  --only, --skip      make these checks, or all but these
  --limit SECONDS     longest that a check may take; default 180

checks:"""


DAY_S = 86400.0


@dataclass(frozen=True)
class Asked:
    """A command line, read."""

    words: tuple[str, ...] = ()
    """CONFIG and flags for it."""
    json: bool = False
    bad_nodes: Path | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    limit_s: float = 180.0


def doctor(args: list[str]) -> None:
    """`pretrain doctor [CONFIG] ...`, as in USAGE.

    Raises:
        UserError: on every rank, a check failed on some rank.
        RanksLost: a rank died or hangs in a check.
    """
    if {"-h", "--help"} & set(args):
        print(USAGE)
        from pretrain.doctor.registry import CHECKS

        print("\n".join(f"  {check.name:13} {check.needs}" for check in CHECKS))
        return
    asked = read(args)
    from pretrain.doctor.examination import RanksMissing, examine, refuse_crowding
    from pretrain.doctor.registry import chosen
    from pretrain.world import join

    checks = chosen(asked.only, asked.skip)
    refuse_crowding()
    # The watch over each check speaks first, for it knows its name.
    with join(2 * asked.limit_s) as world:
        try:
            found = examine(world, asked.words, checks, asked.limit_s)
        except RanksMissing as lost:
            name_nodes(asked.bad_nodes, lost.nodes)
            raise
        if world.is_main:
            name_nodes(asked.bad_nodes, found.bad_nodes)
            show(found.facts(), True) if asked.json else print(found.text(), flush=True)
    if found.failed:
        raise UserError(f"to be mended first: {', '.join(found.failed)}")


def name_nodes(folder: Path | None, nodes: Sequence[str]) -> None:
    """An empty file for each node at fault, which the launcher leaves out the next time."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for node in nodes:
            (folder / node).touch()


def read(args: Sequence[str]) -> Asked:
    """The doctor's own flags, wherever they stand; what is left is CONFIG and its flags.

    Raises:
        UserError: a flag's value is missing or is none, or flags for a config come without one.
    """
    left, given = list[str](), dict[str, list[str]]()
    flag = ""
    for word in (part for arg in args for part in _parts(arg)):
        if word in _FLAGS:
            flag = word
            given.setdefault(flag, [])
        elif flag and not word.startswith("--") and len(given[flag]) < _FLAGS[flag]:
            given[flag].append(word)
        else:
            flag = ""
            left.append(word)
    for flag, values in given.items():
        if not values and _FLAGS[flag]:
            raise UserError(f"{flag} needs a value; see pretrain doctor --help")
    if left and left[0].startswith("-"):
        raise UserError(f"{left[0]}: which config? pretrain doctor CONFIG {left[0]} ...; see pretrain doctor --help")
    folder = Path(given["--bad-nodes"][0]) if "--bad-nodes" in given else None
    only, skip = tuple(given.get("--only", ())), tuple(given.get("--skip", ()))
    return Asked(tuple(left), "--json" in given, folder, only, skip, _seconds(given.get("--limit", ["180"])[0]))


_FLAGS = {"--json": 0, "--bad-nodes": 1, "--limit": 1, "--only": 1000, "--skip": 1000}
"""Most words that follow each."""


def _parts(arg: str) -> list[str]:
    """`--only=ring` is `--only ring`."""
    return arg.split("=", 1) if arg.split("=", 1)[0] in _FLAGS else [arg]


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= DAY_S:
        raise UserError(f"--limit {text} must be a number of seconds above 0, a day at most, such as 180")
    return found
