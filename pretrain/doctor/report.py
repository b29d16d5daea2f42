"""All findings of all ranks as a person reads them: what ranks agree on is one line, what one finds has its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.doctor.base import Finding, Status


@dataclass(frozen=True)
class Line:
    """What one or several ranks have found."""

    check: str
    name: str
    status: Status
    found: str
    needed: str
    mend: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What the examination came to; the same on every rank."""

    lines: tuple[Line, ...]
    nodes: tuple[str, ...]
    """Of each rank."""
    bad_nodes: tuple[str, ...]

    @property
    def failed(self) -> list[str]:
        return list(dict.fromkeys(line.name for line in self.lines if line.status == "fail"))

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"findings": [asdict(line) for line in self.lines], "nodes": self.nodes, "bad_nodes": self.bad_nodes}

    def text(self) -> str:
        """A table, with how to mend below each line that is not well."""
        width = max((len(line.name) for line in self.lines), default=0)
        return "\n".join(self._told(line, width) for line in self.lines)

    def _told(self, line: Line, width: int) -> str:
        needed = f"; needed: {line.needed}" if line.needed and line.status != "skip" else ""
        told = f"{line.status:4}  {line.name:{width}}  {line.found}{needed}{self._who(line)}"
        mend = line.mend if line.status in ("warn", "fail") else ""
        return f"{told}\n      {'':{width}}  mend: {mend}" if mend else told

    def _who(self, line: Line) -> str:
        if len(self.nodes) == 1:
            return ""
        if len(line.ranks) > 4:
            return f" ({len(line.ranks)} ranks)"
        alone = len(line.ranks) < sum(len(other.ranks) for other in self.lines if other.name == line.name)
        if not alone and line.status in ("ok", "skip"):
            return f" ({len(line.ranks)} rank{'s' if len(line.ranks) > 1 else ''})"
        return f" ({', '.join(f'rank {rank} on {self.nodes[rank]}' for rank in line.ranks)})"


def lines(found: Sequence[Sequence[Finding]], nodes: Sequence[str], checks: dict[str, str]) -> tuple[Line, ...]:
    """Equal findings of ranks merged; in the order in which they were made.

    Args:
        found: of each rank.
        nodes: of each rank.
        checks: the check that each finding's name belongs to.
    """
    merged: dict[tuple[str, ...], dict[int, Finding]] = {}
    for rank, mine in enumerate(found):
        for each in mine:
            merged.setdefault((each.name, each.status, each.found, each.needed, each.mend), {})[rank] = each
    order = list(checks)
    made = [
        Line(checks[first.name], first.name, first.status, _found(of, nodes), first.needed, first.mend, tuple(of))
        for of in merged.values()
        for first in [next(iter(of.values()))]
    ]
    return tuple(sorted(made, key=lambda line: order.index(line.name)))


def _found(of: dict[int, Finding], nodes: Sequence[str]) -> str:
    """With the range of what was measured, and where it is least."""
    first = next(iter(of.values()))
    amounts = {rank: finding.amount for rank, finding in of.items() if finding.amount is not None}
    if not amounts:
        return first.found
    least, most = (pick(amounts, key=amounts.__getitem__) for pick in (min, max))
    low, high = f"{amounts[least]:.3g}", f"{amounts[most]:.3g}"
    if low == high:
        return f"{first.found}, {low} {first.unit}"
    return f"{first.found}, {low} (rank {least} on {nodes[least]}) to {high} {first.unit}"
