"""The ranks of a run: who this process is, and how all of them agree that one has failed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import ProcessDied, RanksLost, Stopped, UserError
from pretrain.phases import phase
from pretrain.rendezvous import fresh_store


@dataclass(frozen=True)
class World:
    """This process among the W processes of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    timeout: timedelta | None = None
    """How long a collective waits for the other ranks; None: as long as torch thinks right."""
    group: dist.ProcessGroup | None = None
    """Over which small collectives go; None: torch's default group."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files and speaks to the user."""
        return self.rank == 0

    @contextmanager
    def together(self, doing: str, *questions: Callable[[], bool]) -> Iterator[Vote]:
        """What fails here on any rank fails on all, with that rank's message, instead of leaving the others waiting.

        Every rank must enter and leave the block; there may be no collective inside it. Leaving it is one small
        all-reduce on the CPU, and none where this rank is alone.

        Args:
            questions: asked at the block's end and answered in the same all-reduce, as `Vote.answers`.

        Raises:
            UserError: some rank raised one, or an OSError, inside the block.
            ProcessDied: a process of some rank died.
            Stopped: a signal stopped some rank inside the block.
            RuntimeError: some rank raised anything else; the rank itself raises its own exception.
        """
        own, vote = None, Vote()
        try:
            yield vote
        except Exception as error:
            own = error
        failed, *answers = self.any(own is not None, *(question() for question in questions))
        vote.answers = tuple(answers)
        if not failed:
            return
        found = self.share(_Failure.of(own, self.rank))
        if own is not None and not isinstance(own, _SHARED):
            raise own
        first: _Failure = next(failure for failure in found if failure)
        raise first.as_error(doing) from own

    def new_group(self, ranks: list[int] | None = None, **how: Any) -> dist.ProcessGroup:
        """A further process group, with this world's timeout, which torch would not hand down to it.

        Every rank of the world must make the same groups in the same order.

        Args:
            ranks: who is in it; None: all.
            how: other options of `dist.new_group`.
        """
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=self.timeout, **how)
        return group

    def apart(self) -> World:
        """This world over a group of its own on the CPU: collectives of a thread meet only their like. Collective."""
        return replace(self, group=self.new_group(backend="gloo")) if self.size > 1 else self

    def share(self, item: Any) -> list[Any]:
        """`item` of every rank, in rank order; a small picklable value."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with phase("agreeing", "all_gather"):
            dist.all_gather_object(items, item, group=self.group)
        return items

    def gather_rows(self, rows: Tensor) -> Tensor:
        """[n, ...] of every rank, below each other in rank order; n may differ between ranks, or be 0.

        Args:
            rows: on the CPU; the dtype and the other sizes are the same on every rank.
        """
        if self.size == 1:
            return rows
        counts = self.share(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        with phase("agreeing", "all_gather"):
            dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it holds on some rank: the same answers on all of them, by one small CPU all-reduce."""
        if self.size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        with phase("agreeing", "all_reduce"):
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(vote) for vote in votes)


@dataclass
class Vote:
    """What ranks agreed on at the end of a block."""

    answers: tuple[bool, ...] = ()
    """For each question whether some rank said yes: the same on all of them."""


def environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun, srun or nobody has set them."""
    for rank, size, local in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, 0))
    return 0, 1, 0


@contextmanager
def join(timeout_s: float, traces: Path | None = None) -> Iterator[World]:
    """The world of this process, connected: NCCL for CUDA tensors, gloo for what stays on the CPU.

    Args:
        timeout_s: a collective that some rank does not enter for this long ends the process.
        traces: folder where NCCL writes what it had under way when one timed out, as files rank_0, rank_1...

    Raises:
        RanksLost: other ranks did not come, to the start or to a collective, or are gone.
    """
    rank, size, local_rank = environment()
    timeout, cuda = timedelta(seconds=timeout_s), torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        if size > 1:
            _prepare_nccl(timeout_s, traces)
            store = fresh_store(rank, size, timeout_s)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        yield World(rank, size, local_rank, device, timeout)
    except BaseException as error:
        if size > 1 and _is_of_ranks(error):  # leaving a group whose other ranks are gone may wait for them
            raise RanksLost(f"rank {rank} lost the others: {' '.join(str(error).split())[:300]}") from error
        _leave(size)
        raise
    _leave(size)


_BACKEND = re.compile(r"gloo|NCCL|pair closure|(closed|reset) by peer")
"""In messages of the libraries that carry collectives; gloo's errors have no type of their own."""


def _is_of_ranks(error: BaseException) -> bool:
    if isinstance(error, dist.DistError | RanksLost):
        return True
    return isinstance(error, RuntimeError) and _BACKEND.search(str(error)) is not None


def _leave(size: int) -> None:
    if size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def _prepare_nccl(timeout_s: float, traces: Path | None) -> None:
    """NCCL's own watch: it ends the process when a collective times out, and writes down what was under way."""
    wanted = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(max(60, int(timeout_s))),
    }
    wanted |= {} if traces is None else {"TORCH_FR_DUMP_TEMP_FILE": str(traces.absolute() / "rank_")}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


_SHARED = (UserError, OSError, ProcessDied, Stopped)
"""Errors that every rank raises as what they are; anything else is a fault of one rank's code."""


@dataclass(frozen=True)
class _Failure:
    rank: int
    message: str
    kind: type[Exception]

    @staticmethod
    def of(error: Exception | None, rank: int) -> _Failure | None:
        if error is None:
            return None
        kind = next((kind for kind in _SHARED if isinstance(error, kind)), RuntimeError)
        return _Failure(rank, str(error) or type(error).__name__, kind)

    def as_error(self, doing: str) -> Exception:
        """The error that every rank raises: the user's is told as it is, a failing disk or file with what was done."""
        if self.kind is UserError:
            return UserError(self.message)
        if self.kind is OSError:
            return UserError(f"{doing}: {self.message}")
        if self.kind in (ProcessDied, Stopped):
            return self.kind(self.message)
        return RuntimeError(f"rank {self.rank} failed while {doing}: {self.message}")
