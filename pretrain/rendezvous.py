"""How ranks find each other, also when a launcher has started them for the second time.

torchrun keeps one key-value store for all its attempts, and what a killed attempt wrote there (addresses of processes
that are gone) is still in it when the next one connects: a rank that is quick reads it and fails with "connection
refused" (seen with torch 2.13 and gloo). So the ranks of an attempt first agree on a name of their own for it.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from pretrain.errors import RanksLost

POLL_S = 0.02


def fresh_store(rank: int, size: int, timeout_s: float) -> Store:
    """A store that holds nothing of an earlier attempt; all `size` ranks call it."""
    found = rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout_s))
    store: Store = next(iter(found))[0]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return store
    name = _name_attempt(store, size, timeout_s) if rank == 0 else _learn_name(store, rank, timeout_s)
    return PrefixStore(name, store)


def _name_attempt(store: Store, size: int, timeout_s: float) -> str:
    """Rank 0 answers every rank's latest call until each has confirmed this very name: old calls die unanswered."""
    name, deadline, missing = uuid.uuid4().hex, time.monotonic() + timeout_s, set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"call/{rank}"]):
                store.set(f"answer/{rank}/{store.get(f'call/{rank}').decode()}", name)
        if time.monotonic() > deadline:
            raise RanksLost(f"ranks {sorted(missing)} did not come within {timeout_s:.0f} s")
        time.sleep(POLL_S)
    return name


def _learn_name(store: Store, rank: int, timeout_s: float) -> str:
    call = uuid.uuid4().hex
    store.set(f"call/{rank}", call)
    answer = f"answer/{rank}/{call}"
    store.wait([answer], timedelta(seconds=timeout_s))
    name: str = store.get(answer).decode()
    store.set(f"{name}/{rank}", "here")
    return name
