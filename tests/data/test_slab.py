"""Shared memory without a name: its slots, and that nothing of it outlives its processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pretrain.data.slab import Column, Slab, fresh

LAYOUT = {
    "images": Column((3, 5, 7), torch.uint8),
    "texts": Column((4,), torch.int64),
    "ids": Column((), torch.int64),
    "scores": Column((2, 3), torch.float32),
}
CPU = torch.device("cpu")


def test_columns_have_their_shapes_and_do_not_overlap() -> None:
    slab = Slab(LAYOUT, rows=3, slots=4)
    for batch in range(4):
        for value, column in enumerate(slab.slot(batch).values()):
            column.fill_(10 * batch + value)
    for batch in range(4):
        for value, (name, column) in enumerate(slab.slot(batch).items()):
            assert column.shape == (3, *LAYOUT[name].shape)
            assert column.dtype == LAYOUT[name].dtype
            assert (column == 10 * batch + value).all()


def test_batches_take_turns_and_what_was_taken_stays() -> None:
    slab = Slab(LAYOUT, rows=3, slots=2)
    slab.slot(0)["ids"].copy_(torch.tensor([1, 2, 3]))
    taken = slab.take(0, 2, CPU)
    slab.wait_free(2)
    slab.slot(2)["ids"].fill_(9)
    assert slab.slot(0)["ids"].tolist() == [9, 9, 9]
    assert slab.slot(1)["ids"].data_ptr() != slab.slot(0)["ids"].data_ptr()
    assert taken["ids"].tolist() == [1, 2]
    slab.close()


def test_a_forked_process_writes_what_the_other_reads() -> None:
    slab = Slab(LAYOUT, rows=2, slots=1)
    pid = os.fork()
    if not pid:
        slab.slot(0)["scores"].fill_(2.5)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (slab.slot(0)["scores"] == 2.5).all()


def test_it_takes_no_named_memory() -> None:
    """Of an anonymous shared mapping the kernel shows a file that never had a name, and its permissions end in s."""
    slab = Slab(LAYOUT, rows=200, slots=8)
    address = slab.slot(0)["images"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_, name = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            assert (permissions, name) == ("rw-s", "/dev/zero (deleted)")
            return
    pytest.fail("the slab is nowhere")


def test_fresh_columns_are_as_the_slab_has_them() -> None:
    slab = Slab(LAYOUT, rows=6, slots=1)
    for name, column in fresh(LAYOUT, 6).items():
        assert column.shape == slab.slot(0)[name].shape
        assert column.dtype == slab.slot(0)[name].dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_pinned_slot_is_not_free_before_its_copy_is_done() -> None:
    device = torch.device("cuda", 0)
    slab = Slab({"images": Column((1 << 24,), torch.uint8)}, rows=8, slots=2)
    slab.pin()
    try:
        for turn in range(10):
            slab.wait_free(turn)
            slab.slot(turn)["images"].fill_(turn)
            taken = slab.take(turn, 8, device)["images"]
            slab.wait_free(turn)
            slab.slot(turn)["images"].fill_(255)
            assert (taken == turn).all()
    finally:
        slab.close()
    slab.pin()
    slab.close()
