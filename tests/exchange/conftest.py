"""Ranks that are threads of this process, for every test here."""

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from pretrain.values import Pairs

# Before Python 3.12 a cached property lets one thread at a time in, over all instances: the others could never answer.
Pairs.__dict__["trip"].lock = nullcontext()


@pytest.fixture(scope="session")
def virtual() -> ModuleType:
    """The module `virtual.py`: with importlib import mode tests/ is no package."""
    name = "tests_exchange_virtual"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "virtual.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
