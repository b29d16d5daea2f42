"""What is done with a rendering: it is shown, handed to a tool of this machine, or takes this process's place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pretrain.errors import UserError


def tell(text: str, facts: dict[str, Any], as_json: bool) -> None:
    """Print a rendering, or what is known of it as JSON."""
    print(json.dumps(facts) if as_json else text, end="\n" if as_json else "")


def become(command: list[str]) -> NoReturn:
    """A program takes this process's place, so that signals reach it.

    Raises:
        UserError: it is not installed.
    """
    refuse_missing(command[0])
    sys.stdout.flush()
    os.execvp(command[0], command)


def lead(command: list[str]) -> int:
    """Run a program that at TERM would end at once and leave its children behind; its exit code.

    A signal goes to its children instead, and it ends when they have.

    Raises:
        UserError: it is not installed.
    """
    refuse_missing(command[0])
    sys.stdout.flush()
    process = subprocess.Popen(command)

    def tell_children(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in children or [str(process.pid)]:
                os.kill(int(pid), number)

    signal.signal(signal.SIGTERM, tell_children)
    return process.wait()


def hand(command: list[str], text: str = "") -> str:
    """Run a tool and wait for it; what it prints.

    Args:
        text: its input.

    Raises:
        UserError: it is not installed, or refuses.
    """
    refuse_missing(command[0])
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` refuses: {' '.join(f'{done.stderr} {done.stdout}'.split())[-600:]}")
    return done.stdout


def refuse_missing(tool: str) -> None:
    """Raises: UserError: a tool is not installed."""
    if shutil.which(tool) is None:
        raise UserError(f"{tool} is not on the PATH: start from a machine that has it, or look with --dry-run")
