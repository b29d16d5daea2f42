"""What only all ranks together tell: who differs from most, who is slower than most, which nodes are at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from pretrain.doctor.base import Finding, Status

FEWEST = 3
"""Ranks from which on a median tells which one is slow."""

Found = Sequence[Sequence[Finding]]
"""Of each rank."""


def judged(found: Found) -> list[list[Finding]]:
    """The same findings, with those that failed by comparison. A pure function: every rank comes to the same."""
    usual, pace = _usual(found), _pace(found)
    return [[_slow(_differs(finding, usual), pace) for finding in of_rank] for of_rank in found]


def bad_nodes(found: Found, nodes: Sequence[str], checks: dict[str, str]) -> list[str]:
    """Nodes that are at fault themselves: a check failed there that did not fail on every rank that made it.

    Args:
        nodes: of each rank.
        checks: the check that each finding's name belongs to.
    """
    bad = set[str]()
    for check in dict.fromkeys(checks.values()):
        made = {rank for rank, mine in enumerate(found) if any(checks[each.name] == check for each in mine)}
        failed = {rank for rank in made if _failed(found[rank], check, checks)}
        bad |= {nodes[rank] for rank in failed} if failed != made else set()
    return sorted(bad)


def _failed(mine: Sequence[Finding], check: str, checks: dict[str, str]) -> bool:
    return any(each.status == "fail" and checks[each.name] == check for each in mine)


def _each(found: Found) -> Iterator[Finding]:
    return (finding for of_rank in found for finding in of_rank)


def _usual(found: Found) -> dict[str, tuple[str | None, int, int]]:
    """(value of more than half, how many have it, of how many) by name; None: no value has."""
    values: dict[str, Counter[str]] = {}
    for finding in _each(found):
        if finding.alike:
            values.setdefault(finding.name, Counter())[finding.alike] += 1
    usual = {}
    for name, counts in values.items():
        value, count = counts.most_common(1)[0]
        usual[name] = (value if 2 * count > counts.total() else None, count, counts.total())
    return usual


def _differs(finding: Finding, usual: dict[str, tuple[str | None, int, int]]) -> Finding:
    value, count, of = usual.get(finding.name, (finding.alike, 0, 0))
    if not finding.alike or finding.alike == value:
        return finding
    most = "no two halves agree" if value is None else f"{value} on {count} of {of} ranks"
    return replace(finding, status=_worse(finding), needed=_joined(finding.needed, most))


def _pace(found: Found) -> dict[str, float]:
    amounts: dict[str, list[float]] = {}
    for finding in _each(found):
        if finding.amount is not None:
            amounts.setdefault(finding.name, []).append(finding.amount)
    return {name: median(each) for name, each in amounts.items() if len(each) >= FEWEST}


def _slow(finding: Finding, pace: dict[str, float]) -> Finding:
    usual = pace.get(finding.name)
    if usual is None or finding.amount is None or not finding.least or finding.amount >= finding.least * usual:
        return finding
    needed = _joined(finding.needed, f"the median is {usual:.3g} {finding.unit}")
    return replace(finding, status=_worse(finding), needed=needed)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _worse(finding: Finding) -> Status:
    """Never better than what the rank itself found."""
    order: tuple[Status, ...] = ("ok", "skip", "warn", "fail")
    return max(finding.status, finding.unlike, key=order.index)
