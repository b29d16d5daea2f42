"""The ranks of one start as real processes, forked from this one, which has imported everything already.

Each has a process group of its own, with its workers in it, as launchers make them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pretrain import cli, errors
from pretrain.drill.inject import HAPPENS
from pretrain.drill.spec import VARIABLE

WORDS = {errors.DONE: "done", errors.FAILURE: "failed", errors.USER_ERROR: "refused", errors.REQUEUE: "saved"}
"""Exit codes as the catalogue and the table call them; a signal has its own name."""
GRACE_S, LONGEST_S, POLL_S = 40.0, 120.0, 0.01
"""How long ranks may live on once one has ended badly; how long a start may take; how often is looked."""


class Ranks:
    """One start. A context manager: leaving it leaves no process behind."""

    def __init__(self, words: Sequence[str], log_folder: Path, size: int, fault: str = "", fresh: bool = False) -> None:
        """
        Args:
            words: what follows `pretrain` on the command line.
            log_folder: gets one file a rank with what it said.
            fault: PRETRAIN_FAULT of every rank.
            fresh: start new interpreters, as a user does, instead of forks of this one.
        """
        log_folder.mkdir(parents=True)
        self._logs = [log_folder / f"rank_{rank}.log" for rank in range(size)]
        variables = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
        variables |= {VARIABLE: fault} if fault else {}
        # Gloo otherwise asks for the address of the host's name, which a container may not be able to resolve.
        variables |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        make = _Fresh if fresh else _Fork
        self._processes: list[_Fork | _Fresh] = []
        for rank, log in enumerate(self._logs):
            own = variables | {"RANK": rank, "LOCAL_RANK": rank}
            self._processes.append(make(words, {key: str(value) for key, value in own.items()}, log))
        self.abandoned: set[int] = set()
        """Ranks that did not end by themselves."""

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def wait(self, grace_s: float = GRACE_S) -> list[str]:
        """How each rank ended, a word each; those that outlive a failed one by `grace_s` are ended here."""
        until, ended_badly = time.monotonic() + LONGEST_S, None
        while None in (codes := [process.poll() for process in self._processes]):
            if ended_badly is None and any(code not in (None, errors.DONE) for code in codes):
                ended_badly = time.monotonic()
                until = min(until, ended_badly + grace_s)
            if time.monotonic() > until:
                self.abandoned = {rank for rank, code in enumerate(codes) if code is None}
                self.kill()
            time.sleep(POLL_S)
        return [word(code) for code in codes if code is not None]

    def until_paused(self, rank: int) -> bool:
        """Whether a rank comes to stand still, as SIGSTOP makes it, before it ends."""
        return self._until(rank, lambda state: state["State"].startswith("T"))

    def until_catches(self, rank: int, number: signal.Signals) -> bool:
        """Whether a rank comes to have a handler for a signal before it ends."""
        return self._until(rank, lambda state: bool(int(state["SigCgt"], 16) >> (number - 1) & 1))

    def _until(self, rank: int, holds: Callable[[dict[str, str]], bool]) -> bool:
        until, status = time.monotonic() + LONGEST_S, Path(f"/proc/{self.pids[rank]}/status")
        while self._processes[rank].poll() is None and time.monotonic() < until:
            if holds(dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)):
                return True
            time.sleep(POLL_S)
        return False

    def said(self, rank: int) -> str:
        """Everything that a rank has printed so far."""
        return self._logs[rank].read_text(errors="replace") if self._logs[rank].exists() else ""

    def happened(self, rank: int) -> bool:
        """Whether the fault came about there."""
        return HAPPENS in self.said(rank)

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """A signal to ranks (None: all), not to their workers."""
        for rank in range(len(self._processes)) if ranks is None else ranks:
            if self._processes[rank].poll() is None:
                os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """SIGKILL to what is left of every rank's process group."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        for process in self._processes:
            process.reap()


def word(code: int) -> str:
    """An exit code in a word: done, failed, refused, saved, SIGKILL..."""
    return signal.Signals(-code).name if code < 0 else WORDS.get(code, f"exit {code}")


class _Fork:
    def __init__(self, words: Sequence[str], variables: dict[str, str], log: Path) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=_be_a_rank, args=(words, variables, log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        with suppress(OSError):  # whoever comes first, so that the group is there for both from now on
            os.setpgid(self.pid, self.pid)

    def poll(self) -> int | None:
        return self._process.exitcode

    def reap(self) -> None:
        self._process.join()


class _Fresh:
    def __init__(self, words: Sequence[str], variables: dict[str, str], log: Path) -> None:
        command, variables = (
            [sys.executable, "-m", "pretrain", *words],
            os.environ | variables | {"OMP_NUM_THREADS": "1"},
        )
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                command, env=variables, stdout=said, stderr=said, stdin=subprocess.DEVNULL, process_group=0
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def reap(self) -> None:
        self._process.wait()


def _be_a_rank(words: Sequence[str], variables: dict[str, str], log: Path) -> None:
    """What a fresh `pretrain ...` would do, without its imports; the exit code is the command's."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(variables)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(said, number)
    logging.getLogger("pretrain").handlers.clear()
    sys.argv = ["pretrain", *words]
    cli.main()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
