"""Random streams: seeding, saving through a file, replaying a pass."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pretrain import checkpoint_files as files
from pretrain import seed
from pretrain.errors import UserError


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_a_seed_fixes_every_stream_and_ranks_differ() -> None:
    drawn = []
    for number, rank in ((1, 0), (1, 0), (1, 1), (2, 0)):
        seed.seed_everything(number, rank)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    for other in drawn[2:]:
        assert all(a != b for a, b in zip(drawn[0], other, strict=True))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="seed -1"):
        seed.seed_everything(-1)


@pytest.mark.parametrize("draws", [0, 1, 2])
def test_streams_go_on_from_a_file(tmp_path: Path, draws: int) -> None:
    """An odd number of Gaussians leaves a spare one in Python's and NumPy's generators: it is part of the state."""
    for _ in range(draws):
        draw()
    files.write_tensors(tmp_path / "rng.safetensors", seed.rng_state())
    expected = [draw() for _ in range(4)]
    seed.seed_everything(99)
    draw()
    seed.set_rng_state(files.read_tensors(tmp_path / "rng.safetensors"))
    assert [draw() for _ in range(4)] == expected


def test_a_rank_without_a_saved_state_keeps_its_seed() -> None:
    seed.seed_everything(4, 7)
    expected = draw()
    seed.seed_everything(4, 7)
    seed.set_rng_state({})
    assert draw() == expected


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.3))


def test_replay_repeats_dropout_and_leaves_the_stream_where_it_was() -> None:
    model, parts = noisy(), [torch.randn(5, 6) for _ in range(3)]
    replays = [seed.Replay() for _ in parts]
    first = []
    for part, replay in zip(parts, replays, strict=True):
        with replay.record():
            first.append(model(part))
    after = torch.get_rng_state()
    assert not torch.equal(first[0], model(parts[0]))
    torch.set_rng_state(after)
    for part, replay, expected in zip(reversed(parts), reversed(replays), reversed(first), strict=True):
        for _ in range(2):
            with replay.again():
                assert torch.equal(model(part), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_replay_restores_the_stream_after_an_error() -> None:
    replay = seed.Replay()
    with replay.record():
        torch.rand(1)
    after = torch.get_rng_state()
    with pytest.raises(KeyError), replay.again():
        raise KeyError
    assert torch.equal(torch.get_rng_state(), after)


def test_replay_needs_a_record() -> None:
    with pytest.raises(AssertionError, match="nothing was recorded"), seed.Replay().again():
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_streams_are_saved_and_replayed(tmp_path: Path) -> None:
    model, x = noisy().cuda(), torch.randn(5, 6, device="cuda")
    replay = seed.Replay()
    with replay.record():
        first = model(x)
    files.write_tensors(tmp_path / "rng.safetensors", seed.rng_state())
    expected = model(x)
    with replay.again():
        assert torch.equal(model(x), first)
    seed.set_rng_state(files.read_tensors(tmp_path / "rng.safetensors"))
    assert torch.equal(model(x), expected)
