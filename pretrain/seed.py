"""Random streams: seeded per rank, saved with a checkpoint, replayed for a second pass over the same batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import UserError


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy, torch and CUDA, differently on each rank.

    Weights must be equal on all ranks: build the model under rank 0's streams, then seed each rank's own for dropout.

    Raises:
        UserError: seed is negative.
    """
    if seed < 0:
        raise UserError(f"seed {seed} must not be negative")
    python, numpy, pytorch = np.random.SeedSequence((seed, rank)).generate_state(3, np.uint64).tolist()
    random.seed(python)
    np.random.seed(numpy % 2**32)
    # manual_seed seeds every CUDA device too, now or when CUDA starts.
    torch.manual_seed(pytorch % 2**63)


def rng_state() -> dict[str, Tensor]:
    """Every random stream of this process: Python's, NumPy's, torch's on the CPU and on the current CUDA device."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Continue the streams that `rng_state` recorded.

    Args:
        state: {} (a rank that did not exist then) leaves the streams as they were seeded; 'cuda' is used only where
            there is a device.
    """
    if not state:
        return
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class Replay:
    """Gives a second pass over a batch the random numbers of the first: dropout, patch dropout, stochastic depth.

    The stream goes on from where the first pass left it, however often the pass is replayed.
    """

    def __init__(self) -> None:
        self._start: tuple[Tensor, ...] | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Around the first pass."""
        self._start = _torch_streams()
        yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around each further pass."""
        assert self._start is not None, "nothing was recorded"
        after = _torch_streams()
        _set_torch_streams(self._start)
        try:
            yield
        finally:
            _set_torch_streams(after)


def _torch_streams() -> tuple[Tensor, ...]:
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state()) if torch.cuda.is_available() else (cpu,)


def _set_torch_streams(states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
