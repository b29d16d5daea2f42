"""The doctor: what it says of a good config, of a bad one, and of a function that the compiler cannot take whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain import cli, doctor, runfile
from pretrain.config import Run
from pretrain.doctor import towers
from pretrain.doctor.base import Finding
from pretrain.errors import UserError

DEBUG = str(Path(__file__).parents[2] / "configs" / "debug.yaml")


def test_a_good_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", DEBUG, "--model.speed", "causal", "--json"]) == 0
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["torch"]["status"] == found["python"]["status"] == "ok"
    assert "debug-tiny" in found["image tower"]["finding"]
    assert found["speed causal"]["finding"] == "on"
    assert "no convolutions" in found["speed channels_last"]["finding"]
    assert found["graph breaks, text tower"] == {"name": "graph breaks, text tower", "finding": "none", "status": "ok"}


def test_an_option_that_does_not_apply_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", DEBUG, "--model.speed", "channels_last"]) == 2
    said = capsys.readouterr()
    assert "fail  speed channels_last: does not apply" in said.out
    assert "checks failed: speed channels_last" in said.err


def test_breaks_are_told_with_their_place() -> None:
    def broken(rows: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return rows + 1

    said = towers.breaks(lambda rows: broken(rows * 2), torch.ones(2))
    assert len(said) >= 1
    assert f"{__file__}:" in said[0]


def test_a_mistake_is_a_failed_check() -> None:
    def check(run: Run) -> Iterator[Finding]:
        raise UserError("no such thing")
        yield

    assert doctor.examine(runfile.load(DEBUG, []), (check,)) == [Finding("check", "no such thing", "fail")]
