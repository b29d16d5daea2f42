"""Evaluation while a run trains: on time, as a later evaluation finds it, and without a trace in the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.packing.kinds import pack_digits
from tests.program import tensors

pytestmark = pytest.mark.slow
WORDS = ("train", "configs/debug.yaml", "--train.global-batch", 32, "--train.samples", 320, "--data.workers", 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    pack_digits(folder)
    return folder


def test_a_run_is_measured_on_time_and_trains_as_if_it_were_not(program: Any, shards: Path, tmp_path: Path) -> None:
    where = ("--folder", tmp_path, "--data.train", f"{shards}/train/*.tar", "--data.eval", f"{shards}/eval/*.tar")
    program.run(*WORDS, *where, "zero_shot=128", "--name", "measured")
    program.run(*WORDS, *where, "--name", "plain")
    assert tensors(tmp_path / "measured") == tensors(tmp_path / "plain")

    results = {path.name: json.loads(path.read_text()) for path in (tmp_path / "measured" / "eval").iterdir()}
    assert sorted(results) == [f"zero_shot_{step:08}.json" for step in (4, 8, 10)]
    program.run("evaluate", tmp_path / "plain", "--task", "zero_shot", "--workers", 0)
    later = json.loads((tmp_path / "plain" / "eval" / "zero_shot_00000010.json").read_text())
    assert results["zero_shot_00000010.json"]["top1"] == later["top1"]
