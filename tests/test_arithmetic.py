"""What the `loss` section becomes, and that choices made for the user are said once, with their reason."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from pretrain import arithmetic, config, exchange
from pretrain.errors import UserError
from pretrain.kernels import dispatch
from pretrain.world import World

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RUN = config.Run(data=config.Data(train=("synthetic:1024",)), train=config.Train(samples=64, global_batch=64))


def run(towers: str = "fp32", **loss: object) -> config.Run:
    return dataclasses.replace(RUN, model=config.Model(precision=towers), loss=config.Loss(**loss))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("towers", "asked", "device", "products", "gradients"),
    [
        ("fp32", "auto", CPU, None, None),
        ("bf16", "auto", CPU, None, None),
        ("fp32", "auto", GPU, None, None),
        ("bf16", "auto", GPU, torch.float16, None),
        ("bf16", "fp32", GPU, None, None),
        ("fp32", "bf16", CPU, torch.bfloat16, None),
        ("fp32", "mixed", GPU, torch.float16, torch.bfloat16),
    ],
)
def test_precision(
    towers: str, asked: str, device: torch.device, products: torch.dtype | None, gradients: torch.dtype | None
) -> None:
    found = arithmetic.options(run(towers, precision=asked), device)
    assert (found.products, found.gradients) == (products, gradients)


def test_every_other_knob_arrives() -> None:
    found = arithmetic.options(run(kernel="reference", accumulators="bf16", slices=7, node_size=2), CPU)
    assert (found.impl, found.accumulators, found.slices, found.node_size) == ("reference", torch.bfloat16, 7, 2)
    assert arithmetic.options(run(), CPU) == exchange.Options()


def test_a_form_that_cannot_run_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = run(kernel="triton", precision="fp16")
    with pytest.raises(UserError, match=r"loss.kernel triton: impl 'triton' needs CUDA tensors, not cpu"):
        arithmetic.open_exchange(asked, World(0, 1, 0, CPU), 32)


def test_auto_says_what_it_took_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pretrain"):
        name = exchange.automatic(8, exchange.Options(), exchange.Load(64, 32, 4e9, on_gpu=False))
    assert name == "gather"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("exchange: gather (512 pairs of width 32 on 8 ranks")
    assert "predicted" in said


def test_too_little_memory_makes_auto_stream() -> None:
    load = exchange.Load(rows=8192, width=1024, memory_bytes=2e9, on_gpu=True)
    assert exchange.automatic(64, exchange.Options(products=torch.float16, node_size=8), load) != "gather"


def test_the_form_of_a_kernel_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pretrain.kernels"):
        for _ in range(3):
            assert dispatch.choose("a kernel of this test", "auto", torch.zeros(1)) == "blockwise"
            dispatch.choose("a kernel of this test", "reference", torch.zeros(1))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["a kernel of this test runs its blockwise form: features are on cpu"]
