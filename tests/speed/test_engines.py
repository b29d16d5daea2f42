"""Options of model.speed, and checkpointing, under one process, DDP and FSDP2: the steps of the plain towers.

In fp64, so that a difference is a mistake and no rounding. Compiled code is traced and differentiated as ever, but run
by PyTorch's own operators: inductor itself is tested on its own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.speed import compiled

_path = Path(__file__).parents[1] / "engines" / "training.py"
_spec = importlib.util.spec_from_file_location("tests_speed_training", _path)
assert _spec is not None
assert _spec.loader is not None
training = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = training
_spec.loader.exec_module(training)

CASES: dict[str, dict[str, Any]] = {
    "short": {"model": {"speed": ("short_texts", "compile"), "grad_checkpointing": "every=2"}},
    "selective": {"model": {"speed": ("causal", "compile"), "grad_checkpointing": "selective"}},
    "uncompiled": {"model": {"speed": ("short_texts",), "grad_checkpointing": "selective"}, "micro_batch": 3},
}
BACKENDS = {"short": "eager", "selective": "aot_eager", "uncompiled": "eager"}


def run(case: dict[str, Any], backend: str) -> dict[str, Any]:
    """Steps of one rank, with a compiler that leaves the arithmetic to PyTorch."""
    torch._dynamo.reset()
    compiled.BACKEND = backend
    return training.on_rank({"fp64": True, "steps": 2} | case)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return training.on_rank({"fp64": True, "steps": 2, "engine": "single", "model": {"speed": ()}})


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_plain_towers(ranks: Any, plain: dict[str, Any], case: str, monkeypatch: Any) -> None:
    """Losses, of which the second follows an update; first gradients; names in a checkpoint."""
    monkeypatch.setattr(compiled, "BACKEND", BACKENDS[case])
    found = {"single": run(CASES[case] | {"engine": "single"}, BACKENDS[case])}
    for engine in ("ddp", "fsdp2"):
        found[engine] = ranks(2).run(run, CASES[case] | {"engine": engine}, BACKENDS[case])[0]
    for engine, result in found.items():
        assert result["losses"] == pytest.approx(plain["losses"], rel=1e-11), engine
        assert result["weights"].keys() == plain["weights"].keys(), engine
        difference, name = training.furthest(result["gradients"], plain["gradients"])
        assert difference < 1e-10, f"{engine}: gradient of {name}: {difference:.1e}"
