"""The ranks of a run: who this process is, and how all of them agree that one has failed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.errors import ProcessDied, UserError
from pretrain.rendezvous import fresh_store


@dataclass(frozen=True)
class World:
    """This process among the W processes of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files and speaks to the user."""
        return self.rank == 0

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """What fails here on any rank fails on all, with that rank's message, instead of leaving the others waiting.

        Every rank must enter and leave the block; there may be no collective inside it.

        Raises:
            UserError: some rank raised one, or an OSError, inside the block.
            ProcessDied: a process of some rank died.
            RuntimeError: some rank raised anything else; the rank itself raises its own exception.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        if not self.any(own is not None)[0]:
            return
        found = self.share(_Failure.of(own, self.rank))
        if own is not None and not isinstance(own, UserError | OSError | ProcessDied):
            raise own
        first: _Failure = next(failure for failure in found if failure)
        raise first.as_error(doing) from own

    def share(self, item: Any) -> list[Any]:
        """`item` of every rank, in rank order; a small picklable value."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
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
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it holds on some rank: the same answers on all of them, by one small CPU all-reduce."""
        if self.size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes)


def environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun, srun or nobody has set them."""
    for rank, size, local in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, 0))
    return 0, 1, 0


@contextmanager
def join(timeout_s: float) -> Iterator[World]:
    """The world of this process, connected: NCCL for CUDA tensors, gloo for what stays on the CPU.

    Args:
        timeout_s: a collective that some rank does not enter for this long ends the process.
    """
    rank, size, local_rank = environment()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        store, timeout = fresh_store(rank, size, timeout_s), timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, local_rank, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Failure:
    rank: int
    message: str
    kind: type[Exception]

    @staticmethod
    def of(error: Exception | None, rank: int) -> _Failure | None:
        if error is None:
            return None
        kind = next((kind for kind in (UserError, OSError, ProcessDied) if isinstance(error, kind)), RuntimeError)
        return _Failure(rank, str(error) or type(error).__name__, kind)

    def as_error(self, doing: str) -> Exception:
        """The error that every rank raises: the user's is told as it is, a failing disk or file with what was done."""
        if self.kind is UserError:
            return UserError(self.message)
        if self.kind is OSError:
            return UserError(f"{doing}: {self.message}")
        if self.kind is ProcessDied:
            return ProcessDied(self.message)
        return RuntimeError(f"rank {self.rank} failed while {doing}: {self.message}")
