"""Starts of the program for tests: `program.start("train", ...)`; and what a test asks of a run's folder.

A cold start takes five seconds of processor time for imports. Here one process per pytest worker, stem.py, imports
once and forks for each `pretrain ...` asked of it; the fork does what `python -m pretrain` does, from `__main__` on.
Forks of one process share its hash seed, and libraries have read the environment before: where that could matter
(`COLD`), and under every launcher, the fork executes a fresh interpreter instead.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
ALONE = (sys.executable, "-m", "pretrain")
COLD = ("ATEN_", "CUDA_", "DS_", "HF_", "MKL_", "OMP_", "ONEDNN_", "PYTHONHASHSEED", "PYTORCH_", "TORCH_", "TRITON_")
"""Beginnings of variables that torch and others read when they are imported."""
START_S, PATIENCE_S, FINISH_S, POLL_S = 120.0, 120.0, 240.0, 0.005


class Job:
    """A process, as `subprocess.Popen` shows it; what it says goes to files, so nobody needs to read it."""

    def __init__(self, program: Program, command: Sequence[str], pid: int, said: Path) -> None:
        self.args, self.pid = list(command), pid
        self.returncode: int | None = None
        self._program, self._said = program, said
        self._ended = program.folder / f"ended{pid}"

    @property
    def out(self) -> str:
        return self._said.with_suffix(".out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._said.with_suffix(".err").read_text(errors="replace")

    @property
    def said(self) -> str:
        return self.out + self.err

    def poll(self) -> int | None:
        if self.returncode is None:
            with suppress(FileNotFoundError):
                self.returncode = int(self._ended.read_text())
                self._ended.unlink()
                return self.returncode
            assert self._program.alive, "the process that forks has died"
        return self.returncode

    def wait(self, timeout: float = FINISH_S) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout, self.out, self.err)
            time.sleep(POLL_S)
        return code

    def communicate(self, timeout: float = FINISH_S) -> tuple[str, str]:
        self.wait(timeout)
        return self.out, self.err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self.kill()
        self.wait()


def torchrun(size: int, *options: str) -> tuple[str, ...]:
    """A launcher: `program.start(..., launcher=torchrun(2))`."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size))
    return (*launcher, *options, "-m", "pretrain")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines that are written so far of RUN/metrics.jsonl, RUN/events.jsonl and their like."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def records(run: Path) -> list[dict[str, Any]]:
    return lines(run / "metrics.jsonl")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == kind]


def until(job: Job, holds: Callable[[], Any]) -> Any:
    """Wait until something holds, which is given back, or the process has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := holds()) and job.poll() is None:
        assert time.monotonic() < deadline, f"the run does not get on: {job.said}"
        time.sleep(POLL_S)
    return found


def until_step(job: Job, run: Path, step: int) -> None:
    """Wait until a step is logged, or the process has ended."""
    until(job, lambda: any(record["step"] >= step for record in records(run)))


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def tensors(run: Path) -> dict[str, bytes]:
    """The newest checkpoint's, by file."""
    checkpoint = newest(run)
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*.safetensors")}


class Program:
    """Starts commands; a session's fixture, which carries the functions above with it."""

    torchrun, free_port, lines = staticmethod(torchrun), staticmethod(free_port), staticmethod(lines)
    records, events, until_step = staticmethod(records), staticmethod(events), staticmethod(until_step)
    newest, tensors, until = staticmethod(newest), staticmethod(tensors), staticmethod(until)

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="program-")
        self.folder = Path(self._home.name)
        self._stem: subprocess.Popen[bytes] | None = None
        self._connection: Connection
        self._variables: dict[str, str] = {}
        self._count = 0

    @property
    def alive(self) -> bool:
        return self._stem is not None and self._stem.poll() is None

    def start(
        self,
        *words: object,
        launcher: Sequence[str] = ALONE,
        variables: Mapping[str, object] | None = None,
        cwd: Path = ROOT,
        cold: bool = False,
    ) -> Job:
        """`pretrain WORDS` or a script, forked; executed, if `cold` or under another `launcher`."""
        command = (*launcher, *map(str, words))
        self._count += 1
        said = self.folder / str(self._count)
        added = {name: str(value) for name, value in (variables or {}).items()}
        given = os.environ | {"OMP_NUM_THREADS": "1"} | added
        connection = self._connected()
        ours = (launcher[1] == "-m" and launcher[2].startswith("pretrain")) or launcher[1].endswith(".py")
        warm = ours and not cold and self._as_imported(given)
        connection.send((command, given, str(cwd), str(said), warm))
        return Job(self, command, connection.recv(), said)

    def run(self, *words: object, expect: int = 0, **how: Any) -> Job:
        """The finished process of a `start`; its exit code is `expect`."""
        with self.start(*words, **how) as job:
            job.wait()
        assert job.returncode == expect, f"exit code {job.returncode}\n{job.said}"
        return job

    @contextmanager
    def ranks(self, size: int, *words: object, variables: Mapping[str, object] | None = None) -> Iterator[list[Job]]:
        """Ranks as a scheduler starts them: no launcher ends one because another has ended. None is left behind."""
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        # Gloo otherwise asks for the address of the host's name, which a container may not be able to resolve.
        shared |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        own = [shared | dict(variables or {}) | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
        jobs = [self.start(*words, variables=each) for each in own]
        try:
            yield jobs
        finally:
            for job in jobs:
                job.kill()
                job.wait()

    def run_ranks(self, size: int, *words: object, expect: int = 0, **how: Any) -> list[Job]:
        """Finished ranks; the exit code of each is `expect`."""
        with self.ranks(size, *words, **how) as jobs:
            codes = [job.wait() for job in jobs]
        assert codes == [expect] * size, "\n".join(f"exit code {job.returncode}\n{job.said}" for job in jobs)
        return jobs

    def close(self) -> None:
        if self._stem is not None:
            self._connection.close()
            self._stem.wait(60)
        self._home.cleanup()

    def _as_imported(self, variables: Mapping[str, str]) -> bool:
        """Whether what libraries read at their import has not changed since."""
        names = [name for name in {*variables, *self._variables} if name.startswith(COLD)]
        return all(variables.get(name) == self._variables.get(name) for name in names)

    def _connected(self) -> Connection:
        if self._stem is None:
            self._variables = os.environ | {"OMP_NUM_THREADS": "1"}
            listener = Listener(str(self.folder / "socket"), "AF_UNIX")
            self._stem = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("stem.py")), str(self.folder)],
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            listener._listener._socket.settimeout(START_S)  # type: ignore[attr-defined]
            self._connection = listener.accept()
            listener.close()
        return self._connection
