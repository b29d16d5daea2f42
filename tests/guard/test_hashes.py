"""A hash of weights: what changes it, what does not, and that ranks which differ are found and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pretrain.config import Data, Run, Train
from pretrain.config import Guard as Options
from pretrain.errors import RunFailed
from pretrain.guard import hashes
from pretrain.guard.guard import Guard
from pretrain.sinks import Sinks
from pretrain.world import World


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.LayerNorm(3))


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(model().named_parameters()) | changes


def test_every_bit_every_place_and_every_name_counts() -> None:
    whole = hashes.of_whole(weights())
    assert whole == hashes.of_whole(dict(reversed(weights().items())))
    assert len(whole) == 16
    first = weights()["0.weight"].detach().clone()
    flipped = first.clone()
    flipped.view(torch.int32)[4, 6] ^= 1
    others = [
        hashes.of_whole(weights(**{"0.weight": changed}))
        for changed in (flipped, first.flip(0), first.T.reshape(5, 7), first.roll(1), first.double(), first.bfloat16())
    ]
    others.append(hashes.of_whole({f"x{name}": value for name, value in weights().items()}))
    assert len({whole, *others}) == 8
    assert hashes.of_whole(weights(**{"2.bias": torch.tensor([0.0, 0.0, -0.0])})) != whole


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    long = torch.randn(1000)
    whole = int(hashes.hashes([hashes.Part("x", long, 0, False)]))
    monkeypatch.setattr(hashes, "_CHUNK", 64)
    assert int(hashes.hashes([hashes.Part("x", long, 0, False)])) == whole
    cut = [hashes.Part("x", long[:300], 0, True), hashes.Part("x", long[300:], 300, True)]
    assert int(hashes.hashes(cut).sum()) == whole


def compared(spread: bool, replicas: int, broken: int | None) -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    made = model()
    if spread:
        shape = (size,) if replicas == 1 else (replicas, size // replicas)
        names = ("replicas", "shards")[-len(shape) :]
        fully_shard(made, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    if rank == broken:
        held: Any = made[1].weight.data
        (held.to_local() if spread else held).view(torch.int32)[0, 0] ^= 1 << 20
    found = hashes.parts(hashes.comparable(made))
    whole, difference = hashes.compare(found, World(rank, size, rank, torch.device("cpu")))
    return whole, None if difference is None else (difference.name, difference.ranks, str(difference))


@pytest.mark.ranks
def test_two_ranks_are_compared_whole_or_by_shards(ranks: Any) -> None:
    whole = hashes.of_whole(weights())
    assert ranks(2).run(compared, False, 1, None) == [(whole, None)] * 2
    assert ranks(2).run(compared, True, 1, None) == [(whole, None)] * 2, "shards add up"
    for answer in ranks(2).run(compared, False, 1, 1):
        assert answer[1] == ("1.weight", (1,), "1.weight differs on rank 1 from what the others hold")
    assert ranks(2).run(compared, True, 1, 1)[0][1] is None, "nobody else holds that shard"


@pytest.mark.ranks
def test_replicas_of_shards_are_compared_with_each_other(ranks: Any) -> None:
    whole = hashes.of_whole(weights())
    assert ranks(4).run(compared, True, 2, None) == [(whole, None)] * 4
    for answer in ranks(4).run(compared, True, 2, 2):
        assert answer[1][:2] == ("1.weight", (2,))
    for answer in ranks(4).run(compared, False, 1, 0):
        assert answer[1][:2] == ("1.weight", (0,)), "the minority, not the first rank, is wrong"


class Heard(Sinks):
    def __init__(self) -> None:
        super().__init__({}, [])
        self.events: list[Any] = []

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append((kind, facts["step"], facts["parameter"], facts["ranks"]))


def guarded(step: int) -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    data = Data(train=("synthetic:8",))
    run = Run(guard=Options(compare_steps=6), data=data, train=Train(samples=8, global_batch=8))
    made, heard = model(), Heard()
    guard = Guard(run, World(rank, size, rank, torch.device("cpu")))
    towers: Any = type("Towers", (), {"towers": made})()
    guard.after(6, towers, heard, due=False)
    before = guard.weights_hash
    made[0].bias.data[1] += 1e-3 * rank
    try:
        guard.after(step, towers, heard, due=False)
    except RunFailed as failed:
        return before, str(failed), heard.events
    return before, guard.weights_hash, heard.events


@pytest.mark.ranks
def test_a_run_whose_ranks_differ_ends_with_one_line(ranks: Any) -> None:
    whole = hashes.of_whole(weights())
    assert ranks(2).run(guarded, 7) == [(whole, None, [])] * 2, "only every so many steps"
    for before, said, events in ranks(2).run(guarded, 12):
        assert before == whole
        assert said.startswith("after step 12 0.bias differs on rank 1 from what the others hold: ")
        assert events == [("weights_differ", 12, "0.bias", (1,))]
