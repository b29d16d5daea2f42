"""torch's DataLoader, set up the way every loader here needs it."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.config import Data

_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def worker_loader(dataset: Dataset[Any], indices: Iterable[Any], data: Data, device: torch.device) -> DataLoader[Any]:
    """dataset[index] for each index, in order, computed in `data.workers` processes.

    A worker that dies (out of memory, mostly) is a RuntimeError in the consumer within seconds.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=data.workers,
        prefetch_factor=data.prefetch if data.workers else None,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
        # The seed that a DataLoader draws at its start must not come from the stream of the towers' dropout.
        generator=torch.Generator(),
    )


def _as_it_is(part: Any) -> Any:
    return part


def _ignore_signals(_: int) -> None:
    """Schedulers signal every process of a job: the parent decides, saves, and ends its workers itself."""
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
