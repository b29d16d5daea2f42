"""Shared by all tests: seeds, threads, pools of rank processes."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def load(path: Path) -> Any:
    """A test helper by path: with importlib import mode tests/ is no package."""
    spec = importlib.util.spec_from_file_location(f"tests_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, on one thread."""
    random.seed(0)
    if torch := sys.modules.get("torch"):  # tests of what must not import torch do not pay for it
        torch.manual_seed(0)
        torch.set_num_threads(1)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


@pytest.fixture(scope="session")
def ranks(program: Any) -> Iterator[Any]:
    """`ranks(3).run(function, *args)`: results of a module-level function on three gloo ranks, in rank order."""
    pools = load(Path(__file__).parent / "ranks.py").Pools(program)
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def program() -> Iterator[Any]:
    """`program.run("train", ...)`: the command in a process of its own; see program.py, whose module this is."""
    module = load(Path(__file__).parent / "program.py")
    started = module.Program()
    yield started
    started.close()
