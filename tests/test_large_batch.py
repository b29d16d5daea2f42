"""A batch of 65,536 pairs on one CPU process: one loss over all of them, whatever the micro-batch, within 4 GiB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import config, engines, exchange, objectives, step
from pretrain.model import build
from pretrain.objectives import ops
from pretrain.values import Batch
from pretrain.world import World

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 16, "width": 16, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 4, "vocab_size": 512, "width": 16, "heads": 1, "layers": 1},
}


def cached_step(model_file: str, pairs: int, micro_batch: int) -> float:
    """The loss of one cached-feature step over random pairs."""
    method = objectives.find("clip")
    chosen = [method(method.Options())]
    model = build(config.Model(name=model_file), chosen, seed=1, device=CPU).train()
    images = torch.randint(0, 256, (pairs, 3, 16, 16), dtype=torch.uint8)
    batch = Batch(images, torch.randint(1, 400, (pairs, 4)), torch.arange(pairs), tuple(map(str, range(pairs))))
    engine = engines.find("single", 1)(model, config.Optim(), World(0, 1, 0, CPU))
    terms, _ = step.cached_step(engine, chosen, exchange.make("local", 0, 1), batch, micro_batch)
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.towers.parameters())
    return float(step.total(terms).detach())


MEASURED = """
import importlib.util, json, resource, sys
spec = importlib.util.spec_from_file_location("large", sys.argv[1])
large = importlib.util.module_from_spec(spec); spec.loader.exec_module(large)
loss = large.cached_step(sys.argv[2], int(sys.argv[3]), 4096)
print(json.dumps({"loss": loss, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.mark.slow
def test_65536_pairs_fit_into_4_gib(model_file: str) -> None:
    """Their logits alone would take 16 GiB."""
    command = [sys.executable, "-c", MEASURED, __file__, model_file, "65536"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert 10 < found["loss"] < 15  # random pairs: about ln 65536 = 11.1
    assert found["peak"] < 4 * 2**30


@pytest.mark.parametrize("micro_batch", [1, 4, 16, 64])
def test_one_loss_a_step_whatever_the_micro_batch(
    model_file: str, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    symmetric_cross_entropy = ops.symmetric_cross_entropy

    def counted(pairs: Any, *options: Any) -> Any:
        rows.append(len(pairs.image))
        return symmetric_cross_entropy(pairs, *options)

    monkeypatch.setattr(ops, "symmetric_cross_entropy", counted)
    cached_step(model_file, 64, micro_batch)
    assert rows == [64]
