"""Commands of shell that stay readable: a line for each option, quoted where that is needed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class Shell(str):
    """A word that is shell already, such as '"$SLURM_JOB_ID"'; every other word is quoted."""


def line(words: Sequence[str]) -> str:
    """The words of a command, or of a part of one, on one line."""
    return " ".join(word if isinstance(word, Shell) else shlex.quote(word) for word in words)


def command(*parts: Sequence[str], after: str = "") -> str:
    """A command of several parts, each on a line of its own; empty parts are left out."""
    return " \\\n  ".join(line(part) for part in parts if part) + after
