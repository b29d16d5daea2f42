"""Experiment trackers: TensorBoard and Weights & Biases, both with samples seen as their x axis."""

from __future__ import annotations

import importlib
import logging
import netrc
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pretrain.checkpoint_files import write_atomic
from pretrain.config import Run

log = logging.getLogger(__name__)


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, samples: int = 0) -> None:
        """
        Args:
            samples: pairs seen when this attempt starts; what an earlier one wrote beyond them is hidden.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=samples + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in flat(record).items():
            self._writer.add_scalar(name, value, record["samples"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases, kept at arm's length: whatever it does, or fails to do, training goes on.

    One daemon thread makes every call, so that a network that hangs holds up neither a step nor the end of the run.
    """

    def __init__(self, run: Run, close_s: float = 90.0, backlog: int = 10_000) -> None:
        """
        Args:
            close_s: longest wait for uploads at the end of the run; what is left stays on disk for `wandb sync`.
            backlog: records to hold while it is slow; more are dropped.
        """
        self._close_s = close_s
        self._todo: queue.Queue[dict[str, float] | None] = queue.Queue(backlog)
        self._run = run
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="wandb sink", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._todo.put_nowait(flat(record) | {"samples": record["samples"]})
        except queue.Full:
            self._tell("is too slow, and records are dropped")

    def close(self) -> None:
        """Waits at most `close_s`."""
        try:
            self._todo.put_nowait(None)
        except queue.Full:
            return self._tell("did not take the last records")
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            self._tell(f"did not finish within {self._close_s:.0f} s; `wandb sync` uploads the rest")
        return None

    def _work(self) -> None:
        try:
            session = _start(self._run, self._close_s, self._tell)
            while (record := self._todo.get()) is not None:
                session.log(record)
            session.finish()
        except BaseException as error:  # wandb raises SystemExit and KeyboardInterrupt of its own
            self._tell(f"failed and is off for the rest of the run: {type(error).__name__}: {str(error)[:300]}")

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("wandb %s", what)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a record under 'outer/inner' names, without its x axis and without texts and gaps."""
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and (prefix or key != "samples"):
            numbers[f"{prefix}{key}"] = value
    return numbers


def logged_in(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb would find a login, without asking the network or a person."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start(run: Run, close_s: float, tell: Callable[[str], None]) -> Any:
    """A wandb run: online with a login, offline without one or where the network does not answer."""
    wandb: Any = importlib.import_module("wandb")
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    limits = {"console": "off", "init_timeout": 60, "finish_timeout": close_s, "quiet": True}
    known = getattr(wandb.Settings, "model_fields", {})
    options: dict[str, Any] = {
        "project": run.log.wandb,
        "name": run.name,
        "id": _identity(run.path / "wandb_id"),
        "resume": "allow",
        "dir": str(run.path),
        "config": asdict(run),
        "settings": wandb.Settings(**{name: value for name, value in limits.items() if name in known}),
    }
    try:
        session = wandb.init(mode=mode, **options)
    except Exception as error:
        if mode != "online":
            raise
        tell(f"cannot be reached and runs offline ({type(error).__name__}); `wandb sync` uploads it later")
        session = wandb.init(mode="offline", **options)
    session.define_metric("samples")
    session.define_metric("*", step_metric="samples")
    return session


def _identity(path: Path) -> str:
    """The run's id at wandb, the same after every restart."""
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:16] + "\n")
    return path.read_text().strip()
