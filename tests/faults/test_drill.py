"""The short drill, a test for each of its faults, and whether a drill can fail at all."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.drill import faults
from pretrain.drill.trial import Setting

SHORT = [fault.name for fault in faults.catalogue(2) if fault.short]
pytestmark = [pytest.mark.slow, pytest.mark.ranks]


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rows of one short drill by name; several pytest workers share it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / "short-drill.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = base / "short-drill.jsonl"
        if not found.exists():
            words = [sys.executable, "-m", "pretrain", "drill", "--short", "--json"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=400)
            assert done.returncode in (0, 1), done.stderr
            found.write_text(done.stdout)
        return {row["name"]: row for row in map(json.loads, found.read_text().splitlines())}


@pytest.mark.parametrize("name", SHORT)
def test_fault(short: dict[str, Any], name: str) -> None:
    row = short[name]
    assert row["good"], row["problems"]
    assert row["weights"] == "equal"


def test_the_short_drill_stands_for_the_long_one(short: dict[str, Any]) -> None:
    assert list(short) == SHORT
    assert len(SHORT) >= 8
    assert sum(row["took_s"] for row in short.values()) > 1.0, "the time of a fault is told"


def test_any_number_of_ranks_shares_the_batch_and_has_a_short_drill(tmp_path: Path) -> None:
    assert Setting(2, "auto", tmp_path).length == ("--train.samples", "192", "--train.global-batch", "16")
    assert Setting(3, "auto", tmp_path).length == ("--train.samples", "216", "--train.global-batch", "18")
    assert sum(fault.short for fault in faults.catalogue(3)) == len(SHORT)


FAILING = """
import sys
from pathlib import Path
from pretrain.drill.faults import Fault
from pretrain.drill.run import tried
from pretrain.drill.scripts import DONE, KILLED, injected
from pretrain.drill.trial import Setting

faults = [
    Fault("never", "", injected("kill@loss:step=99", KILLED)),
    Fault("other-weights", "", injected("slow@loss", DONE), ("--seed", "1")),
]
for row in tried(faults, Setting(2, "auto", Path(sys.argv[1]))):
    print(row.name, row.good, row.weights, *row.problems, sep="|")
"""


def test_a_drill_can_fail(tmp_path: Path) -> None:
    """A fault that does not come about, and a run with other weights, are told as failures."""
    done = subprocess.run([sys.executable, "-c", FAILING, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    never, other = done.stdout.splitlines()
    assert never.startswith("never|False|equal|"), never
    assert "kill@loss:step=99 did not happen" in never
    assert "rank 0 ended as done, not SIGKILL" in never
    assert other.startswith("other-weights|False|different|"), other
    assert "tensors differ" in other
