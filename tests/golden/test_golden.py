"""The losses of configs/debug.yaml are what they were: changing arithmetic is a decision (`make golden`)."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the stored losses are those of x86-64 with AVX2")
@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the stored losses are those of torch 2.13")
def test_twenty_steps_are_what_they_were() -> None:
    spec = importlib.util.spec_from_file_location("renew", HERE / "renew.py")
    assert spec is not None
    assert spec.loader is not None
    renew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(renew)
    maker, *stored = renew.LOSSES.read_text().splitlines()
    found = renew.losses()
    if maker == renew.maker():
        assert found == stored
    else:
        values = [[float.fromhex(line.split()[2]) for line in lines] for lines in (found, stored)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
