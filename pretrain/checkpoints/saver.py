"""Checkpoints in the background: the loop waits while the state is copied, and for a checkpoint before that is late.

Each rank has a thread that writes its files. The ranks' threads agree over a process group of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

from pretrain.checkpoints import places, writing
from pretrain.checkpoints.attempts import Attempt
from pretrain.checkpoints.staging import Stage, Staged
from pretrain.checkpoints.state import State
from pretrain.checkpoints.url import Folder
from pretrain.checkpoints.writing import Keep
from pretrain.phases import phase
from pretrain.world import World


class Saver:
    """Saves states of one run, one after the other. Every rank makes the same calls at the same steps."""

    def __init__(self, home: Folder, world: World, attempt: Attempt | None, keep: Keep | None) -> None:
        """Collective.

        Args:
            home: folder in which `checkpoints/` is.
            attempt: stands back behind later ones; None: whoever comes saves.
            keep: what is left of older checkpoints.
        """
        self._world, self._apart = world, world.apart()
        self._attempt, self._keep = attempt, keep
        self._number = attempt.number if attempt else 0
        self._place = places.of(home / "checkpoints", self._number)
        self._stage = Stage()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._facts: list[dict[str, Any]] = []

    def save(self, take: Callable[[], State], config_text: str, before: int | None = None) -> None:
        """Copy a state and let it be written; waits for the one before. Collective.

        Args:
            take: gives the state.
            config_text: the resolved run.
            before: the newest checkpoint of an earlier step than this is not pruned.

        Raises:
            UserError, ProcessDied: the one before could not be written, on every rank alike.
        """
        started = time.monotonic()
        self.wait()
        waited_s = time.monotonic() - started
        with phase("staging"):
            staged = self._stage.take(take(), self._world, config_text, self._number)
        keep = self._keep and replace(self._keep, before=before)
        facts = {"staging_s": time.monotonic() - started - waited_s, "waited_s": waited_s}
        # A daemon: a process that dies of something else must not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._write, args=(staged, keep, facts), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; when one rank knows, all must `wait`, which raises."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until what was saved is durable under its name.

        Raises:
            UserError, ProcessDied: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finished(self) -> list[dict[str, Any]]:
        """step, bytes, staging_s, writing_s, waited_s of each checkpoint that was entered since the last call."""
        facts, self._facts = self._facts, []
        return facts

    def _write(self, staged: Staged, keep: Keep | None, facts: dict[str, Any]) -> None:
        may = self._attempt.refuse_late if self._attempt else lambda: None
        try:
            done = writing.write(staged, self._place, self._apart, may, keep)
        except Exception as error:  # raised again by `wait`, in the main thread
            self._error = error
            return
        rounded = {name: round(seconds, 4) for name, seconds in {**facts, "writing_s": done.seconds}.items()}
        self._facts.append({"step": staged.step, "bytes": done.bytes, **rounded})

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """What is under way is finished, whatever ends the run; its failure is told unless something else is."""
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()
