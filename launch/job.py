"""What a launcher is asked for: which machines, and which run; the same words for every launcher."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Options of every launcher; a file in configs/clusters may hold them."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """GPUs of each, and as many ranks; 0: none, on a cluster of CPUs."""
    ranks_per_node: int | None = None
    """Ranks on each node; none: one for each GPU."""
    max_restarts: int = 3
    """Failures after which the run is started again, from its last checkpoint; stops by a signal do not count."""
    python: str = sys.executable
    """The interpreter that runs the ranks; in a container, the container's."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("max_restarts", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)} must be {least} or more")
        if self.ranks < 1:
            raise UserError(f"ranks_per_node {self.ranks_per_node or 0}: without GPUs say how many ranks a node has")
        refuse_breaks(self)

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run as a launcher sees it."""

    name: str
    """The run's name."""
    run_folder: Path
    """Absolute: RUN."""
    work_folder: Path
    """Absolute: where the job starts, and relative paths of the config begin."""
    config: Path
    """What the ranks read."""
    flags: tuple[str, ...] = ()
    """Flags after it."""
    code: Path | None = None
    """Folder that holds the `pretrain` that the ranks import; none: the one that is installed."""

    @property
    def words(self) -> tuple[str, ...]:
        """The program of a rank and its arguments, without the interpreter."""
        return ("pretrain", "train", str(self.config), *self.flags)


def refuse_breaks(options: object) -> None:
    """A line break in an option would become a line of the script.

    Raises:
        UserError: some option holds one.
    """
    for name, value in vars(options).items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str) and re.search(r"[\r\n\0]", part):
                raise UserError(f"{name} {part!r} must be one line")
