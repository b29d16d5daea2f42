"""A model and shards that the tests of embedding and searching share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint, config, model
from pretrain.checkpoint import State
from pretrain.data.packing.kinds import pack_folder
from pretrain.search.embed import embed
from pretrain.world import World

CPU = torch.device("cpu")
HERE = World(0, 1, 0, CPU)
COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}


@dataclass(frozen=True)
class Clip:
    init_logit_scale: float = 1 / 0.07
    init_logit_bias: float | None = None
    max_logit_scale: float = 100.0


@dataclass(frozen=True)
class Made:
    """What a test needs of this file: conftest modules cannot be imported by name."""

    here: World
    run: Path
    shards: str
    pictures: Path

    def embed(self, out: Path, **how: Any) -> dict[str, Any]:
        source, shards = how.pop("source", self.run), how.pop("shards", (self.shards,))
        return embed(source, shards, out, world=how.pop("world", self.here), **{"workers": 0, **how})


def save_run(folder: Path, seed: int) -> Path:
    """A run with one checkpoint of a random model."""
    encoder = model.build(config.Model(name="debug-tiny"), Clip(), seed, CPU)
    text = "data: {train: [a.tar]}\nmodel: {name: debug-tiny}\ntrain: {samples: 12, global_batch: 4}\n"
    weights = dict(encoder.towers.state_dict())
    state = State(12, 48, weights, None, {"step/x": torch.ones(1)}, {}, {"t": torch.ones(1)})
    checkpoint.save(folder, state, HERE, text)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """25 coloured pictures in shards of 6, 6, 6, 6 and 1; one caption is hostile."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("search")
    photos = folder / "photos"
    photos.mkdir()
    for n in range(25):
        name, color = list(COLORS.items())[n % 4]
        picture = Image.new("RGB", (24, 24), color)
        picture.putpixel((n % 24, 3), (255, 255, 255))
        picture.save(photos / f"{n:03d}.png")
        text = "<script>alert(1)</script>" if n == 7 else f"a {name} picture, number {n}"
        (photos / f"{n:03d}.txt").write_text(text)
    from pretrain.data.packing.how import How

    pack_folder(photos, folder / "shards", how=How(samples_per_shard=6))
    run = save_run(folder / "run", 1)
    save_run(folder / "other", 2)
    return Made(HERE, run, f"{folder}/shards/*.tar", photos)


@pytest.fixture(scope="session")
def features(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, embedded in one go."""
    out = tmp_path_factory.mktemp("features") / "out"
    made.embed(out, batch_size=4)
    return out
