"""What a fault does to the process that it happens in."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from pretrain.drill.spec import Spec

STORM = 50
"""Signals in a storm."""


def _signal(number: int, spec: Spec) -> None:
    os.kill(os.getpid(), number)


def _storm(spec: Spec) -> None:
    """SIGTERM again and again, to this process and its workers, as a scheduler sends it to all of a job step."""
    for _ in range(STORM):
        os.killpg(0, signal.SIGTERM)
        time.sleep(0.001)


def _refuse(number: int, spec: Spec) -> None:
    raise OSError(number, os.strerror(number), f"{spec.phase} of a drill")


def _limit(spec: Spec) -> None:
    """The kernel lets no file of this process grow beyond `value` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(spec.value), resource.RLIM_INFINITY))


def _slow(spec: Spec) -> None:
    time.sleep(spec.value)


def _clock(spec: Spec) -> None:
    """The wall clock is `value` seconds off from now on; the monotonic one stays, as it does when a clock is set."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + spec.value
    time.time_ns = lambda: now_ns() + int(spec.value * 1e9)


def _raise(spec: Spec) -> None:
    raise RuntimeError(f"{spec.phase} failed on purpose")


def _kill_worker(spec: Spec) -> None:
    """SIGKILL to the first process that this one has started."""
    started = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    os.kill(int(started[0]), signal.SIGKILL)


class _Broken(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{self.__name__}.{name} is broken on purpose")


def _break_wandb(spec: Spec) -> None:
    sys.modules["wandb"] = _Broken("wandb")


def _break_tensorboard(spec: Spec) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "an event file")

    SummaryWriter.add_scalar = fail  # type: ignore[method-assign]


def _fail_transfers(spec: Spec) -> None:
    """The next `value` reads of shards behind a URL fail, as a connection that breaks."""
    from pretrain.data.storage.remote import Remote

    left, system = [int(spec.value)], Remote.system

    def refuse(remote: Remote, name: str) -> Any:
        if left[0]:
            left[0] -= 1
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return system(remote, name)

    Remote.system = refuse  # type: ignore[assignment,method-assign]


ACTS: Mapping[str, Callable[[Spec], None]] = {
    "kill": partial(_signal, signal.SIGKILL),
    "pause": partial(_signal, signal.SIGSTOP),
    "term": partial(_signal, signal.SIGTERM),
    "int": partial(_signal, signal.SIGINT),
    "usr2": partial(_signal, signal.SIGUSR2),
    "storm": _storm,
    "enospc": partial(_refuse, errno.ENOSPC),
    "eio": partial(_refuse, errno.EIO),
    "erofs": partial(_refuse, errno.EROFS),
    "fsize": _limit,
    "slow": _slow,
    "clock": _clock,
    "raise": _raise,
    "transfer": _fail_transfers,
    "worker": _kill_worker,
    "wandb": _break_wandb,
    "tensorboard": _break_tensorboard,
}
