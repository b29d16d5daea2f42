"""Every command of docs/cluster.md is run: the walk on a real SLURM of two nodes, with the doctor on every rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.launch import asked, slurm

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
WALK, REST = PAGE.split("## The launcher")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what the commands of the page name; runs/ is its own."""
    for name in ("configs", "Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return tmp_path


def run(block: str, folder: Path, before: str = "", **variables: str) -> str:
    """What a block prints; make only says what it would do, because it may want the network."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MAKEFLAGS": "n"}
    command = ["bash", "-euo", "pipefail", "-c", f". .venv/bin/activate\n{before}\n{block}"]
    environment = os.environ | own | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_block_is_run_or_checked() -> None:
    assert set(re.findall(r"^```(\w+)", PAGE, re.MULTILINE)) == {"bash", "yaml"}


def test_a_cluster_file_of_the_page_is_one(tmp_path: Path) -> None:
    (block,) = blocks(PAGE, "yaml")
    file = tmp_path / "site.yaml"
    file.write_text(block)
    assert len(asked.of_cluster(str(file), slurm.Slurm)) >= 2 * len(yaml.safe_load(block))


def test_the_walk(cluster: Any, checkout: Path) -> None:
    prepare, submit, look, preempt, spare, finish = blocks(WALK, "bash")

    def tell(block: str, before: str = "") -> str:
        return run(block, checkout, before, **cluster.environment)

    tell(prepare)
    said = tell(submit)
    assert "#SBATCH --nodes=2" in said
    (number,) = re.findall(r"^job +(\d+)$", said, re.MULTILINE)
    job = cluster.sent(number, checkout / "runs" / "first")
    job.until_step(5)
    assert "ok    all-reduce" in job.said()  # the doctor's, of both ranks
    tell(look)
    tell(preempt)
    job.until("REQUEUED")
    tell(spare, f"job={number}\nsleep 2")
    job.until_started()
    job.until("COMPLETED")
    said = tell(finish)
    assert "finished" in said
    assert "300 of 300" in said
    (stopped,) = job.events("stopped")
    assert [event["step"] for event in job.events("start")] == [0, stopped["step"]]


@pytest.mark.parametrize("block", blocks(REST, "bash"), ids=lambda block: block.split("--")[0].strip())
def test_the_other_commands_run(block: str, checkout: Path) -> None:
    if "deepspeed" in block:
        pytest.importorskip("deepspeed")
    said = run(block, checkout)
    assert said.count("pretrain train") == len(block.splitlines())
    assert not (checkout / "runs").exists()
