"""What is examined, by what, and what is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.config import Run
from pretrain.world import World

Status = Literal["ok", "skip", "warn", "fail"]
"""skip: it could not be looked at here; warn: the run works, but not as well as it could; fail: it does not."""


@dataclass(frozen=True)
class Finding:
    """One line of the report, of one rank. What takes the other ranks to judge, `judge` does once all have found."""

    name: str
    """What was looked at; findings of ranks are compared under it."""
    found: str
    status: Status = "ok"
    needed: str = ""
    mend: str = ""
    """What to do where it is not so."""
    alike: str = ""
    """What must be the same on all ranks that have it; '': nothing."""
    amount: float | None = None
    """What was measured, in `unit`; it is told beside `found`, as a range over the ranks."""
    unit: str = ""
    least: float = 0.0
    """Share of the ranks' median `amount` that a rank must reach; 0: whatever it is, it is well."""
    unlike: Status = "fail"
    """What a rank's finding becomes that differs from most, or is slower than it must be."""


@dataclass(frozen=True)
class Patient:
    """This rank, the ranks beside it, and the run that they are to carry out."""

    world: World
    nodes: tuple[str, ...]
    """The node of each rank."""
    config: Run | None = None
    """None: there is none, or this rank cannot read it."""

    @property
    def run(self) -> Run:
        """For checks that are only made with a config."""
        assert self.config is not None
        return self.config

    @property
    def node(self) -> str:
        return self.nodes[self.world.rank]

    @property
    def neighbours(self) -> int:
        """Ranks on this node, this one among them."""
        return self.nodes.count(self.node)


Look = Callable[[Patient], Iterator[Finding]]
"""Looks at one matter; a UserError, or anything else that it raises, is a failed check."""


@dataclass(frozen=True)
class Check:
    """A matter to look at."""

    name: str
    look: Look
    needs: str
    """What is needed, for the documentation."""
    why: str
    config: bool = False
    """Only with a config."""
    once: bool = False
    """Says the same on every rank, so that the first alone looks."""
    joint: bool = False
    """The ranks talk to each other in it: an error of the links is theirs, not a finding."""
