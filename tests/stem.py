"""A process that has imported everything and forks for program.py, which runs this file as a script."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import random
import runpy
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("pretrain.verbs", "pretrain.train", "pretrain.runfile", "pretrain.guard.replay", "torch.profiler")


class Order(NamedTuple):
    """What the fork is to be."""

    command: tuple[str, ...]
    variables: dict[str, str]
    cwd: str
    said: str
    warm: bool


def _serve(folder: Path) -> Order:
    """Fork for each order until nobody asks any more; in a fork that is to go on warm, its order."""
    connection = Client(str(folder / "socket"), "AF_UNIX")
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what is here for good is looked at by no fork's collector, so its pages stay shared
    signal.signal(signal.SIGCHLD, lambda *_: _reap(folder))
    while True:
        try:
            order = Order(*connection.recv())
        except (EOFError, KeyboardInterrupt):
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            _become(order)
            return order if order.warm else _execute(order)
        connection.send(pid)


def _reap(folder: Path) -> None:
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            told = folder / f"told{found[0]}"
            told.write_text(str(os.waitstatus_to_exitcode(found[1])))
            told.rename(folder / f"ended{found[0]}")


def _become(order: Order) -> None:
    """What a shell does between fork and exec, and what the interpreter draws when it comes up."""
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{order.said}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(order.cwd)
    os.environ.clear()
    os.environ.update(order.variables)
    random.seed()
    sys.modules["numpy"].random.seed()


def _execute(order: Order) -> NoReturn:
    os.execve(order.command[0], order.command, order.variables)


def _go_on(order: Order) -> NoReturn:
    paths = [path for path in order.variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [order.cwd, *paths]
    sys.argv, sys.orig_argv = [*order.command[1:]], [*order.command]
    code: Any = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    _leave(code or 0)


def _leave(code: int) -> NoReturn:
    """End as the interpreter does, but for freeing what the system frees at once: seconds in a fork."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    _go_on(_serve(Path(sys.argv[1])))
