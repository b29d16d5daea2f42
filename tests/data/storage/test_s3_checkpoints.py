"""Checkpoints over a real S3 protocol on loopback, with connections that break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import checkpoint
from pretrain import checkpoint_files as files
from pretrain.checkpoints.attempts import Attempt
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.state import State
from pretrain.checkpoints.url import Url
from pretrain.checkpoints.writing import Keep
from pretrain.data.storage.remote import Remote
from pretrain.world import World

ONE = World(0, 1, 0, torch.device("cpu"))


def state(step: int) -> State:
    """A few megabytes: more than one part of an upload."""
    weights: dict[str, Tensor] = {"w": torch.full((1500, 1000), float(step)), "scale": torch.tensor(2.0)}
    return State(step, step * 32, weights, None, {}, {}, {"rank": torch.tensor(0)})


@pytest.mark.slow
def test_saved_over_broken_connections_found_read_and_pruned(
    s3: Callable[[int], None], s3_port: int, remote: Remote, make_proxy: Any
) -> None:
    remote.system("s3://saved").mkdir("saved")
    home = Url("s3://saved/run")
    saver = Saver(home, ONE, Attempt(1, (), ""), Keep(2))
    proxy = make_proxy(s3_port)
    s3(proxy.port)
    proxy.faults.extend([("refuse", 0)] * 2)
    for step in (1, 2, 3):
        saver.save(lambda step=step: state(step), "")  # type: ignore[misc]
        saver.wait()
    assert files.names_in(home / "checkpoints") == ["step_00000002.1", "step_00000003.1"]
    proxy.faults.extend([("drop", 90_000), ("truncate", 90_000)])
    found = checkpoint.newest(home, ONE)
    assert found == home / "checkpoints" / "step_00000003.1"
    loaded = checkpoint.load(found, ONE)
    assert torch.equal(loaded.weights["w"], state(3).weights["w"])
    assert torch.equal(loaded.weights["scale"], torch.tensor(2.0))
    (found / "COMMIT").remove()
    assert checkpoint.newest(home, ONE) == home / "checkpoints" / "step_00000002.1"
    remote.system("s3://saved").rm("saved", recursive=True)
