"""64 ranks on one CPU: a fake process group that carries nothing, so that a real step's messages can be counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import config, engines, exchange, objectives, step
from pretrain.model import build
from pretrain.plan.communication import Case
from pretrain.plan.communication import bytes_sent as exchanged
from pretrain.plan.memory import Layout, bytes_sent
from pretrain.plan.towers import Sizes
from pretrain.plan.trace import sizes_of
from pretrain.values import Batch
from pretrain.world import World

RANKS, ROWS, WIDTH = 64, 2, 128
SMALL: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 128, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 128, "heads": 2, "layers": 2},
}
ENGINES: list[tuple[str, dict[str, Any]]] = [
    ("ddp", {}),
    ("fsdp2", {}),
    ("fsdp2", {"reshard": False}),
    ("fsdp2", {"replicas": 8}),
]


class Sent(TorchDispatchMode):
    """Bytes that leave a rank in collectives, each as its ring algorithm over the ranks of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if func.namespace == "c10d":
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg))
            size = dist.ProcessGroup.unbox(group).size()
            kind = name.split(".")[1]
            self.bytes += SHARES[kind](args, size)
            if kind == "recv_":  # nothing comes: columns must be finite all the same, or softmax takes another way
                args[0][0].fill_(WIDTH**-0.5)
        return func(*args, **(kwargs or {}))


def nbytes(tensor: Tensor | list[Tensor]) -> int:
    return tensor.nbytes if isinstance(tensor, Tensor) else sum(one.nbytes for one in tensor)


SHARES: dict[str, Any] = {
    "_allgather_base_": lambda args, size: (size - 1) * nbytes(args[1]),
    "_reduce_scatter_base_": lambda args, size: (size - 1) * nbytes(args[0]),
    "allreduce_": lambda args, size: 2 * (size - 1) / size * nbytes(args[0]),
    "send": lambda args, size: nbytes(args[0]),
    "recv_": lambda args, size: 0,
    "broadcast_": lambda args, size: nbytes(args[0]),
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield World(0, RANKS, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model") / "even-ranks.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def stepped(world: World, described: str, engine: str, parallel: dict[str, Any], way: str, loss: str) -> Any:
    """(bytes of the exchange, bytes of everything, the model) of one rank's second step."""
    method = objectives.find(loss)
    chosen = [method(method.Options())]
    model = build(config.Model(name=described), chosen, seed=1, device=torch.device("cpu")).train()
    made: Any = engines.find(engine, world.size)(model, config.Optim(), world, config.Parallel(**parallel))
    if engine == "ddp":  # the fake group's own sum gives no result, which DDP's built-in way wants
        made.wrapped.register_comm_hook(None, summed)
    columns = exchange.make(way, 0, world.size)
    images, texts = torch.zeros(ROWS, 3, 16, 16, dtype=torch.uint8), torch.ones(ROWS, 8, dtype=torch.int64)
    batch = Batch(images, texts, torch.arange(ROWS), ("a", "b"))
    with Sent():
        step.plain_step(made, chosen, columns, batch)
    made.optimizer.zero_grad(set_to_none=True)
    before = columns.sent
    with Sent() as sent:
        step.plain_step(made, chosen, columns, batch)
    return columns.sent - before, sent.bytes, made.model.towers


# Annotations stay objects for DDP, which compares them with its own types.
def summed(state, bucket):  # type: ignore[no-untyped-def]
    done: Any = torch.futures.Future()
    dist.all_reduce(bucket.buffer())
    done.set_result(bucket.buffer())
    return done


summed.__annotations__.clear()


@pytest.mark.parametrize(
    ("way", "loss"),
    [("gather", "clip"), ("streamed", "clip"), ("ring", "clip"), ("ring", "siglip"), ("bidirectional", "clip")],
)
def test_exchanges_send_what_the_plan_says(world: World, described: str, way: str, loss: str) -> None:
    found, everything, towers = stepped(world, described, "ddp", {}, way, loss)
    assert found == exchanged(way, Case(RANKS, ROWS, WIDTH, bytes_each=4), loss)
    assert everything == pytest.approx(found + bytes_sent(sizes_of(towers), Layout("ddp", RANKS)), abs=2 * RANKS)


@pytest.mark.parametrize(("engine", "parallel"), ENGINES, ids=str)
def test_engines_send_what_the_plan_says(world: World, described: str, engine: str, parallel: dict[str, Any]) -> None:
    found, everything, towers = stepped(world, described, engine, parallel, "gather", "clip")
    shards = RANKS // parallel.get("replicas", 1) if engine == "fsdp2" else 1
    layout = Layout(engine, RANKS, parallel.get("replicas", 1), parallel.get("reshard", True))
    wanted = bytes_sent(padded(towers, shards), layout)
    assert everything - found == pytest.approx(wanted, rel=0.02)


def padded(towers: torch.nn.Module, shards: int) -> Sizes:
    """Numbers as fsdp2 sends them: a tensor's first dimension is filled up to a multiple of the shards."""
    shapes = [param.shape for param in towers.parameters() if param.ndim]
    return Sizes(tuple(-(-shape[0] // shards) * shards * shape[1:].numel() for shape in shapes), ())
