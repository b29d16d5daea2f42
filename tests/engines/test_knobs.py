"""What an engine would have to ignore is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from pretrain import runfile
from pretrain.engines.fsdp2 import refuse_tied
from pretrain.errors import UserError

DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--engine ddp --parallel.offload true", "parallel.offload True means nothing to engine ddp"),
        ("--parallel.replicas 2", "parallel.replicas 2 means nothing to engine auto: it is for fsdp2"),
        ("--engine single --parallel.reduce-dtype bf16", "reduce_dtype bf16 means nothing to engine single"),
        ("--engine fsdp2 --parallel.static-graph true", "parallel.static_graph True means nothing to engine fsdp2"),
        ("--engine ddp --parallel.reshard false", "parallel.reshard False means nothing to engine ddp"),
        ("--engine fsdp2 --parallel.gather-dtype bf16", "gather_dtype bf16 needs model.precision bf16"),
        ("--engine ddp --parallel.static-graph true --train.micro-batch 8", "turn one of them off"),
        ("--engine fsdp2 --optim.name adamw8bit", "optim.name adamw8bit cannot update weights"),
        ("--engine fsdp2 --parallel.replicas 0", "parallel.replicas 0 must be at least 1"),
    ],
)
def test_refused(flags: str, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        runfile.load(DEBUG, flags.split())
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--engine fsdp2 --parallel.replicas 2 --parallel.offload true --parallel.reshard false",
        "--engine fsdp2 --model.precision bf16 --parallel.gather-dtype bf16 --parallel.reduce-dtype bf16",
        "--parallel.reduce-dtype bf16 --parallel.static-graph true",
    ],
)
def test_taken(flags: str) -> None:
    run = runfile.load(DEBUG, flags.split())
    assert run.parallel != type(run.parallel)()


def test_shared_parameters_cannot_be_cut_up() -> None:
    towers = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    refuse_tied(towers)
    towers["head"].weight = towers["embedding"].weight
    with pytest.raises(UserError, match=r"engine fsdp2: embedding\.weight and head\.weight of the model are one"):
        refuse_tied(towers)
