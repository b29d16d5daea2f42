"""Which start of a run may save. Every start takes the next number; a process of an earlier one, cut off from the
others but alive, finds the later number before it enters a checkpoint, and ends.

RUN/attempts/00000002_HOST_PID.json; the same beside checkpoints that lie elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pretrain import checkpoint_files as files
from pretrain.checkpoints.url import Folder
from pretrain.errors import ProcessDied, UserError

FOLDER = "attempts"
_NAME = re.compile(r"(\d{8})_.+\.json")
_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int
    """From 1 on."""
    places: tuple[Folder, ...]
    """Where it has written its number down: folders of files that are sorted by name."""
    file: str

    def refuse_late(self) -> None:
        """Stand back behind a later start.

        Raises:
            ProcessDied: there is one; nothing of it may be touched.
            OSError: the places cannot be looked into.
        """
        for place in self.places:
            if later := [name for name in _listed(place) if name > self.file]:
                raise ProcessDied(
                    f"attempt {self.number} of this run has been followed by attempt {_number(later[-1])} "
                    f"({_who(place, later[-1])}) and saves nothing more; stop this process where it still runs"
                )


def take(homes: Sequence[Folder]) -> Attempt:
    """The next attempt at a run; one rank calls it.

    Args:
        homes: the run folder, and where checkpoints lie elsewhere.

    Raises:
        UserError: another process takes its number at the same moment.
        OSError: a place cannot be written.
    """
    places = tuple(home / FOLDER for home in homes)
    number = max((_number(name) for place in places for name in _listed(place)), default=0) + 1
    host = re.sub(r"[^\w.-]", "-", socket.gethostname())
    attempt = Attempt(number, places, f"{number:08d}_{host}_{os.getpid()}.json")
    facts: dict[str, object] = {"attempt": number, "host": socket.gethostname(), "pid": os.getpid()}
    facts |= {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    facts |= {name.lower(): os.environ[name] for name in _RESTARTS if name in os.environ}
    for place in places:
        files.write_anywhere(place / attempt.file, json.dumps(facts) + "\n")
    try:  # two that start at once see each other: the one that sorts last goes on
        attempt.refuse_late()
    except ProcessDied as error:
        raise UserError(f"{homes[0]}: {error}") from None
    return attempt


def _listed(place: Folder) -> list[str]:
    return sorted(name for name in files.names_in(place) if _NAME.fullmatch(name))


def _number(name: str) -> int:
    return int(name[:8])


def _who(place: Folder, name: str) -> str:
    facts = json.loads((place / name).read_text())
    return f"process {facts['pid']} on {facts['host']}"
