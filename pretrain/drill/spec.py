"""What PRETRAIN_FAULT says: which fault, in which phase, on which rank, how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.errors import UserError
from pretrain.phases import NAMES

VARIABLE = "PRETRAIN_FAULT"
EDGES = ("enter", "leave")


@dataclass(frozen=True)
class Spec:
    """ACT@PHASE[:key=value]..., as in 'kill@backward:step=7:rank=1'."""

    act: str
    """A name of `acts.ACTS`."""
    phase: str
    """A name of `phases.NAMES`."""
    edge: str = "enter"
    """Before the phase's work, or after it."""
    step: int = 0
    """Not before this step of this start, counted from 1; 0: at once."""
    nth: int = 1
    """At this entering of the phase, counted from that step on."""
    times: int = 1
    """How often; 0: from then on always."""
    rank: int | None = None
    """The rank that it happens on; None: all."""
    detail: str = "*"
    """A pattern of the phase's detail: a file, a collective."""
    value: float = 0.0
    """Seconds, bytes: what the act needs."""


_READ: Mapping[str, Callable[[str], Any]] = {"step": int, "nth": int, "times": int, "rank": int, "value": float}


def parse(text: str, acts: Collection[str]) -> list[Spec]:
    """The faults of a text, separated by commas.

    Raises:
        UserError: one of them is not understood.
    """
    return [_parse(part, acts) for part in text.split(",")]


def _parse(text: str, acts: Collection[str]) -> Spec:
    head, *options = text.split(":")
    act, _, phase = head.partition("@")
    if act not in acts:
        raise _mistake(text, f"{act!r} is no fault; one of {', '.join(acts)}")
    if phase not in NAMES:
        raise _mistake(text, f"{phase!r} is no phase; one of {', '.join(NAMES)}")
    known = [field.name for field in dataclasses.fields(Spec)][2:]
    values: dict[str, Any] = {}
    for key, _, value in (option.partition("=") for option in options):
        if key not in known or (key == "edge" and value not in EDGES):
            raise _mistake(text, f"{key}={value}; give {', '.join(f'{name}=...' for name in known)}")
        try:
            values[key] = _READ.get(key, str)(value)
        except ValueError:
            raise _mistake(text, f"{key}={value} is not a number") from None
    return Spec(act, phase, **values)


def _mistake(text: str, what: str) -> UserError:
    return UserError(f"{VARIABLE} {text}: {what}")
