"""Processes that index shards. Started as programs of their own: a fork of a process with threads may hang, and
multiprocessing's other ways import the user's main module again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from pretrain import signals
from pretrain.config import Data
from pretrain.errors import ProcessDied, UserError


class Helpers:
    """A context manager: leaving it ends the processes.

    Args:
        count: processes.
        index_dir: as data.index_dir.
    """

    def __init__(self, count: int, index_dir: str | None) -> None:
        here = str(Path(__file__).resolve().parents[3])
        paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "pretrain.data.shards.index_helpers", *([index_dir] if index_dir else [])]
        environment = {**os.environ, "PYTHONPATH": paths}
        start = partial(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with signals.held():
            self._all: list[subprocess.Popen[str]] = [start(env=environment) for _ in range(count)]
        self._free = SimpleQueue[subprocess.Popen[str]]()
        for process in self._all:
            self._free.put(process)

    def index(self, name: str) -> None:
        """Make and store the index of a local shard; at most as many threads as processes may call it at once.

        Raises:
            UserError, OSError: as `open_shards`.
            ProcessDied: the process was killed, or left.
        """
        process = self._free.get()
        try:
            answer = _ask(process, name)
        finally:
            self._free.put(process)
        if "user" in answer:
            raise UserError(answer["user"])
        if "os" in answer:
            raise OSError(*answer["os"])

    def __enter__(self) -> Helpers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            if kind is not None:
                process.kill()
            process.communicate()


def _ask(process: subprocess.Popen[str], name: str) -> dict[str, str]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(name) + "\n")
        process.stdin.flush()
        answer: dict[str, str] = json.loads(process.stdout.readline() or "null")
    except BrokenPipeError:
        answer = {}
    if not answer:
        code = process.wait(10)
        how = f"was killed by signal {-code} (9 is mostly out of memory)" if code < 0 else f"left with exit code {code}"
        raise ProcessDied(f"a process that indexes shards {how} at {name}; what is indexed stays, start again")
    return answer


def main(index_dir: str | None) -> None:
    """Index each shard named by a line of stdin; answer each with a line."""
    from pretrain.data import storage
    from pretrain.data.shards import indexing

    signals.leave_to_parent()  # which ends this process by closing its stdin
    data = Data(index_dir=index_dir)
    local = storage.make(data)
    for line in sys.stdin:
        answer: dict[str, object] = {"done": True}
        try:
            indexing.open_shard(json.loads(line), data, local)
        except UserError as error:
            answer = {"user": str(error)}
        except OSError as error:
            answer = {"os": [error.errno, error.strerror or str(error), error.filename]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
