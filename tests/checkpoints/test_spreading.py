"""States written by several ranks, each its part, and read by other numbers of ranks and engines, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from pretrain import checkpoint, config, engines, objectives
from pretrain.checkpoints.pieces import Shares
from pretrain.checkpoints.state import State
from pretrain.checkpoints.tensors import Stored
from pretrain.ema import Average
from pretrain.engines import shards
from pretrain.model import build
from pretrain.world import World

Tensors = dict[str, Tensor]
pytestmark = pytest.mark.slow


def world_now() -> World:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return World(rank, size, rank, torch.device("cpu"))


def parts_of_a_run(engine: str, parallel: dict[str, Any]) -> tuple[World, Any, Average]:
    world, method = world_now(), objectives.find("clip")
    device = engines.starts_on(engine, world)
    model = build(config.Model(name="debug-tiny"), [method(method.Options())], seed=1, device=device)
    made: Any = engines.find(engine, world.size)(model, config.Optim(lr=0.1), world, config.Parallel(**parallel))
    return world, made, Average(model.towers, 0.9)


def numbers(shapes: dict[str, torch.Size], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


def wanted(engine: Any, average: Average) -> tuple[Tensors, Tensors, Tensors]:
    """Weights, moments and average that every engine of the model can hold, the same wherever they are made."""
    shapes = {name: value.shape for name, value in engine.model.towers.state_dict().items()}
    params = {name: param.shape for name, param in engine.model.towers.named_parameters()}
    moments = {f"{kind}/{name}": shape for name, shape in params.items() for kind in ("exp_avg", "exp_avg_sq")}
    counts = {f"step/{name}": torch.tensor(7.0) for name in params}
    averaged = {name: value.shape for name, value in average.state().items()}
    return numbers(shapes, 1), numbers(moments, 2) | counts, numbers(averaged, 3)


def save(folder: Path, engine: str, parallel: dict[str, Any]) -> None:
    world, made, average = parts_of_a_run(engine, parallel)
    weights, moments, averaged = wanted(made, average)
    made.load(weights, moments)
    average.load(averaged)
    rng = {"rank": torch.tensor(world.rank)}
    state = State(5, 60, made.model_state(), average.state(), made.optimizer_state(), {}, rng)
    checkpoint.save(folder, state, world, "")


def load(folder: Path, engine: str, parallel: dict[str, Any]) -> int:
    """Load into fresh parts, and compare; bytes that this rank read, of all tensors."""
    world, made, average = parts_of_a_run(engine, parallel)
    found = checkpoint.newest(folder, world)
    assert found is not None
    state = checkpoint.load(found, world)
    read = count_reads()
    made.load(state.weights, state.optimizer)
    assert state.average is not None
    average.load(state.average)
    total = sum(read)
    expected = wanted(made, average)
    for held, right in zip((made.model_state(), made.optimizer_state(), average.state()), expected, strict=True):
        whole = shards.whole(held)
        if world.is_main or not any(map(shards.is_spread, held.values())):
            assert whole.keys() == right.keys()
            assert all(torch.equal(whole[name], right[name]) for name in right)
    return total


def count_reads() -> list[int]:
    from pretrain.checkpoints import tensors

    counts: list[int] = []
    read = getattr(tensors.read_range, "plain", tensors.read_range)

    def counted(path: Any, start: int, size: int) -> bytearray:
        counts.append(size)
        return read(path, start, size)

    counted.plain = read  # type: ignore[attr-defined]
    tensors.read_range = counted
    return counts


SETUPS = {
    "single": (1, "single", {}),
    "ddp": (2, "ddp", {}),
    "fsdp2": (2, "fsdp2", {}),
    "three": (3, "fsdp2", {}),
}


def on(ranks: Any, name: str, function: Any, folder: Path) -> list[Any]:
    size, *how = SETUPS[name]
    return [function(folder, *how)] if size == 1 else ranks(size).run(function, folder, *how)


@pytest.fixture(scope="module")
def saved(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder by each set-up, all of the same state."""
    folder = tmp_path_factory.mktemp("saved")
    for name in SETUPS:
        on(ranks, name, save, folder / name)
    return {name: folder / name for name in SETUPS}


@pytest.mark.ranks
@pytest.mark.parametrize("reader", SETUPS)
def test_every_setup_reads_what_every_setup_wrote(ranks: Any, saved: dict[str, Path], reader: str) -> None:
    for writer in SETUPS:
        read = on(ranks, reader, load, saved[writer])
        if SETUPS[reader][1] == "fsdp2":  # a rank reads what it holds: its rows of every tensor, and small whole ones
            whole = sum(path.stat().st_size for path in saved[writer].rglob("[meo]*.safetensors"))
            assert max(read) < 1.1 * whole / SETUPS[reader][0]


@pytest.mark.ranks
def test_ranks_share_the_writing(saved: dict[str, Path]) -> None:
    for name, (size, _, _) in SETUPS.items():
        folder = saved[name] / "checkpoints" / "step_00000005"
        files = sorted(folder.glob("*/*.safetensors"))
        plain = ["ema", "model", "optimizer"]
        parts = [f"-{n + 1:05d}-of-{size:05d}" for n in range(size)] if size > 1 else [""]
        assert {f.stem for f in files if f.stem[:3] != "rng"} == {stem + part for stem in plain for part in parts}
        ranks = [[f for f in files if part in f.stem and f.stem[:3] != "rng"] for part in parts]
        written = [sum(f.stat().st_size for f in each) for each in ranks]
        assert max(written) < 1.1 * sum(written) / size


@pytest.mark.ranks
def test_others_read_the_weights(saved: dict[str, Path]) -> None:
    """safetensors where tensors are whole, torch.distributed.checkpoint where they are in pieces."""
    single = load_file(saved["single"] / "checkpoints/step_00000005/weights/model.safetensors")
    of_ddp: Tensors = {}
    for path in (saved["ddp"] / "checkpoints/step_00000005/weights").glob("model-*.safetensors"):
        part = load_file(path)
        assert not part.keys() & of_ddp.keys()
        of_ddp |= part
    assert of_ddp.keys() == single.keys()
    assert all(torch.equal(of_ddp[name], value) for name, value in single.items())
    for name in ("single", "three"):
        target = {key: torch.zeros_like(value) for key, value in single.items() if value.ndim}
        folder = saved[name] / "checkpoints/step_00000005/weights"
        only = folder.parent / "models"
        only.mkdir()
        for path in folder.glob("model*"):
            os.link(path, only / path.name)
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(only)), no_dist=True)
        assert all(torch.equal(target[key], single[key]) for key in target)


def test_shares_are_even_and_agreed_without_asking() -> None:
    named = {f"t{n}": torch.zeros(n % 7 + 1, 100) for n in range(40)}
    shares = [Shares().of(named, rank, [0, 2, 3]) for rank in range(4)]
    assert sorted(piece.name for share in shares for piece in share) == sorted(named)
    assert not shares[1]
    sizes = [sum(piece.tensor.numel() for piece in share) for share in shares]
    assert max(sizes) < 1.1 * sum(sizes) / 3


def test_boxes_of_pieces(tmp_path: Path) -> None:
    """Any box, whatever pieces it crosses; what no piece holds is an error."""
    from pretrain.checkpoints import tensors
    from pretrain.checkpoints.pieces import Piece

    whole = torch.arange(7 * 5 * 2).reshape(7, 5, 2)
    cuts = [(0, 3, 0, 5), (3, 7, 0, 2), (3, 7, 2, 5)]
    for n, (a, b, c, d) in enumerate(cuts):
        tensors.write(tmp_path / f"{n}.safetensors", [Piece("x", whole[a:b, c:d], (a, c, 0), (7, 5, 2))])
    files = sorted(tmp_path.iterdir())
    stored = Stored(files)
    assert torch.equal(stored["x"], whole)
    for offset, size in (
        ((2, 1, 0), (3, 3, 2)),
        ((4, 0, 1), (2, 5, 1)),
        ((6, 4, 0), (1, 1, 2)),
        ((0, 0, 0), (7, 5, 2)),
    ):
        box = tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))
        assert torch.equal(stored.part("x", offset, size), whole[box])
    with pytest.raises(OSError, match="pieces of x are missing"):
        Stored([files[0], files[2]])["x"]
