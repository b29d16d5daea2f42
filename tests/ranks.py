"""Pools of gloo rank processes that outlive a test: asking one costs milliseconds. They are forks; see program.py.

A function is sent as the path of its file and its name, so that no test module needs to be importable; arguments and
results are pickled. Run as a script, this file is a rank.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import ModuleType
from typing import Any

START_S, GRACE_S, COLLECTIVE_S = 120.0, 10.0, 60.0
"""Longest wait for a rank to come up; for the others once one rank has failed; for a collective inside a rank."""


class RankError(AssertionError):
    """A rank raised, died or did not answer in time; the message holds every rank's traceback."""


class Pool:
    """`size` processes joined by gloo, each with RANK, WORLD_SIZE and LOCAL_RANK set as a launcher sets them."""

    def __init__(self, size: int, program: Any) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.alive = True
        folder = Path(self.folder.name)
        self.listener = Listener(str(folder / "socket"), "AF_UNIX", backlog=size)
        self.processes = [self._start(program, rank, folder) for rank in range(size)]
        self.connections = self._accept()

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """What a module-level function returns on each rank, in rank order.

        Raises:
            RankError: it raised on some rank, or a rank gave no answer within `timeout_s` (the pool is then gone).
        """
        message = (sys.modules[function.__module__].__file__, function.__qualname__, args)
        for connection in self.connections:
            # Connection.send would move tensors through shared memory, which needs a server in the sender.
            connection.send_bytes(pickle.dumps(message))
        deadline = time.monotonic() + timeout_s
        answers: list[tuple[bool, Any]] = []
        for rank, connection in enumerate(self.connections):
            answer = self._answer(rank, connection, deadline)
            if not answer[0]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
            answers.append(answer)
        failed = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(answers) if not good]
        if failed:
            raise RankError("\n".join(failed))
        return [result for _, result in answers]

    def close(self) -> None:
        self.alive = False
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        self.listener.close()
        self.folder.cleanup()

    def _start(self, program: Any, rank: int, folder: Path) -> Any:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "OMP_NUM_THREADS": 1}
        # Gloo otherwise asks for the address of the host's name, which a container may not be able to resolve.
        variables |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        return program.start(folder, launcher=(sys.executable, __file__), variables=variables)

    def _accept(self) -> list[Connection]:
        self.listener._listener._socket.settimeout(START_S)  # type: ignore[attr-defined]
        found: dict[int, Connection] = {}
        try:
            while len(found) < self.size:
                connection = self.listener.accept()
                found[pickle.loads(connection.recv_bytes())] = connection
        except TimeoutError:
            told = [self._stderr(rank) for rank in range(self.size)]
            self.close()
            raise RankError(f"{self.size} ranks did not come up in {START_S:.0f} s: {told}") from None
        return [found[rank] for rank in range(self.size)]

    def _answer(self, rank: int, connection: Connection, deadline: float) -> tuple[bool, Any]:
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                return pickle.loads(connection.recv_bytes())
            reason = "no answer in time"
        except (EOFError, ConnectionError):
            reason = "the process died"
        told = self._stderr(rank)
        if self.alive:
            self.alive = False
            for process in self.processes:
                process.kill()
        return False, f"{reason}\n{told}"

    def _stderr(self, rank: int) -> str:
        said: str = self.processes[rank].err
        return said[-4000:]


class Pools:
    """The pools of a test session, one per world size; a pool that broke is replaced."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self._pools: dict[int, Pool] = {}

    def __call__(self, size: int) -> Pool:
        pool = self._pools.get(size)
        if pool is not None and not pool.alive:
            pool.close()
        if pool is None or not pool.alive:
            pool = self._pools[size] = Pool(size, self._program)
        return pool

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


@cache
def _module(path: str) -> ModuleType:
    name = f"_sent_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _call(message: tuple[str, str, tuple[Any, ...]]) -> bytes:
    path, name, args = message
    try:
        return pickle.dumps((True, getattr(_module(path), name)(*args)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


def _serve(folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wait = timedelta(seconds=COLLECTIVE_S)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size, timeout=wait)
    connection = Client(str(folder / "socket"), "AF_UNIX")
    connection.send_bytes(pickle.dumps(rank))
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        connection.send_bytes(_call(message))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)
    _serve(Path(sys.argv[1]))
