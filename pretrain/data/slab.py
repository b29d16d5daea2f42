"""Memory that workers fill and the trainer reads: rows of batches, in place, with nothing copied between processes.

An anonymous shared mapping is inherited by forked workers and has no name: it needs no room in /dev/shm, and nothing is
left of it however its processes end.
"""

from __future__ import annotations

import math
import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.errors import UserError

_ALIGN = 4096
"""Bytes; every column begins at a page of its own."""

Columns = dict[str, Tensor]
"""Name -> [rows, ...]."""


class Column(NamedTuple):
    """What a row holds of one tensor of a batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Layout = dict[str, Column]


def fresh(layout: Layout, rows: int) -> Columns:
    """Columns of uninitialised memory of this process."""
    return {name: torch.empty(rows, *column.shape, dtype=column.dtype) for name, column in layout.items()}


class Slab:
    """`slots` batches of `rows` rows; batch n lies in slot n % slots.

    Make it before the workers are forked, `pin` it after: a driver may hide page-locked memory from later children.
    """

    def __init__(self, layout: Layout, rows: int, slots: int) -> None:
        self.slots, self._pinned = slots, False
        sizes = {name: _bytes(column) * rows for name, column in layout.items()}
        padded = {name: -(-size // _ALIGN) * _ALIGN for name, size in sizes.items()}
        self._memory = torch.frombuffer(mmap.mmap(-1, slots * sum(padded.values())), dtype=torch.uint8)
        self._slots: list[Columns] = [{} for _ in range(slots)]
        self._copied: list[torch.cuda.Event | None] = [None] * slots
        start = 0
        for columns in self._slots:
            for name, column in layout.items():
                piece = self._memory[start : start + sizes[name]]
                columns[name] = piece.view(column.dtype).view(rows, *column.shape)
                start += padded[name]

    def slot(self, batch: int) -> Columns:
        """Where batch n is written. The memory holds an older batch until every row is."""
        return self._slots[batch % self.slots]

    def take(self, batch: int, rows: int, device: torch.device) -> Columns:
        """The first `rows` rows of a finished batch, copied once: into this process, or to the device.

        A copy to a device is queued on the current stream, and an event behind it says when the slot may be written
        again.
        """
        columns = {name: column[:rows] for name, column in self.slot(batch).items()}
        if device.type != "cuda":
            return {name: column.clone() for name, column in columns.items()}
        taken = {name: column.to(device, non_blocking=True) for name, column in columns.items()}
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._copied[batch % self.slots] = done
        return taken

    def wait_free(self, batch: int) -> None:
        """Return when batch n may be written: the copy of the batch that lay in its slot is done."""
        copied, self._copied[batch % self.slots] = self._copied[batch % self.slots], None
        if copied is not None:
            copied.synchronize()

    def pin(self) -> None:
        """Lock the pages, so that copies to a GPU run beside everything else; the mapping is shared, so the pages that
        are locked are those that the workers write.

        Raises:
            UserError: CUDA refuses.
        """
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = runtime.cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0)
        if int(code) != 0:
            reason = runtime.cudaGetErrorString(code)
            raise UserError(
                f"data.prefetch {self.slots - 3}: {self._memory.nbytes >> 20} MiB cannot be page-locked ({reason}); "
                "lower it, or give the job more memory"
            )
        self._pinned = True

    def close(self) -> None:
        """Unlock the pages, once every copy from them is done. The memory goes with its last view."""
        for batch in range(self.slots):
            self.wait_free(batch)
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[no-untyped-call]
            self._pinned = False


def _bytes(column: Column) -> int:
    """Of one row."""
    return math.prod(column.shape) * column.dtype.itemsize
