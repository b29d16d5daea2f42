"""The doctor on several ranks: healthy ones agree, one that differs is named with its node, one that hangs ends all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "configs" / "debug.yaml")
LOCAL = ["limits", "cores", "names"]


def run_doctor(args: list[str], ill: str = "", who: int = 1) -> tuple[int, str, str]:
    """On a rank of a pool: exit code and what is said, each rank on a node of its own, `who` with an illness."""
    import torch

    from pretrain import cli
    from pretrain.world import World

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch.dict(os.environ, SLURMD_NODENAME=f"node{rank}"))
        world = contextlib.nullcontext(World(rank, size, rank, torch.device("cpu")))
        stack.enter_context(mock.patch("pretrain.world.join", return_value=world))
        if ill and rank == who:
            stack.enter_context(ILLNESSES[ill]())
        code = cli.run(["doctor", *args])
    return code, out.getvalue(), err.getvalue()


def _late_clock() -> Any:
    from pretrain.doctor import clock

    return mock.patch.object(clock, "time", SimpleNamespace(time=lambda: time.time() + 100))


def _other_code() -> Any:
    from pretrain.doctor import same

    other = {"commit": "0" * 40, "diff": "+ print()", "untracked": []}
    return mock.patch.object(same.record, "git", return_value=other)


def _few_files() -> Any:
    return mock.patch.object(resource, "getrlimit", return_value=(100, 100))


def _wrong_device() -> Any:
    from pretrain.doctor import compute

    return mock.patch.object(compute, "_error", return_value=0.5)


def _wrong_sums() -> Any:
    import torch.distributed as dist

    real = dist.all_reduce

    def wrong(tensor: Any, *args: Any, **kwargs: Any) -> None:
        real(tensor, *args, **kwargs)
        tensor[0] += 1

    return mock.patch.object(dist, "all_reduce", wrong)


def _no_config() -> Any:
    from pretrain import runfile
    from pretrain.errors import UserError

    def load(*_: Any) -> None:
        raise UserError("c.yaml: cannot be read")

    return mock.patch.object(runfile, "load", load)


ILLNESSES = {
    "clock": _late_clock,
    "code": _other_code,
    "files": _few_files,
    "device": _wrong_device,
    "sums": _wrong_sums,
    "config": _no_config,
}


@pytest.mark.ranks
def test_healthy_ranks_are_told_as_one(ranks: Any, tmp_path: Path) -> None:
    (code, said, _), other = ranks(2).run(run_doctor, [DEBUG, "--folder", str(tmp_path)])
    assert (code, other[:2]) == (0, (0, "")), "the first rank alone speaks"
    lines = {line[6:].partition("  ")[0]: line for line in said.splitlines()}
    assert lines["config"].endswith("(2 ranks)")
    assert lines["image tower"].endswith("(1 rank)"), "the first rank alone builds it"
    assert "GB/s" in lines["all-reduce"]
    assert "right" in lines["ring between nodes"]
    assert lines["clock"].startswith("ok")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ill", "check", "bad"),
    [
        ("files", "limits", ["node1"]),
        ("device", "matmul", ["node1"]),
        ("sums", "all_reduce", ["node1"]),
        ("config", "disk", ["node1"]),
        ("code", "same", []),  # of two that differ nobody knows who is right
        ("clock", "clock", []),
    ],
)
def test_one_ill_rank_of_two_ends_both(ranks: Any, tmp_path: Path, ill: str, check: str, bad: list[str]) -> None:
    args = [DEBUG, "--folder", str(tmp_path), "--only", check, "--bad-nodes", str(tmp_path / "bad"), "--json"]
    (code, said, err), other = ranks(2).run(run_doctor, args, ill)
    assert (code, other[0]) == (2, 2)
    told = json.loads(said)
    assert told["bad_nodes"] == sorted(each.name for each in (tmp_path / "bad").iterdir()) == bad
    failed = [line for line in told["findings"] if line["status"] == "fail"]
    assert 1 in {rank for line in failed for rank in line["ranks"]}
    assert all(line["mend"] for line in failed)
    assert failed[0]["name"] in err


@pytest.mark.ranks
@pytest.mark.parametrize(("ill", "check"), [("clock", "clock"), ("code", "same")])
def test_of_three_the_one_that_differs_is_named(ranks: Any, tmp_path: Path, ill: str, check: str) -> None:
    args = ["--only", check, "--bad-nodes", str(tmp_path)]
    found = ranks(3).run(run_doctor, args, ill, 0)
    assert [code for code, _, _ in found] == [2, 2, 2]
    assert [each.name for each in tmp_path.iterdir()] == ["node0"]
    assert "(rank 0 on node0)" in found[0][1]


HANGS = """
import os, time
from pretrain import cli
from pretrain.doctor import registry
from pretrain.doctor.base import Check, Finding
def look(patient):
    if patient.world.rank == 1:
        {what}
    yield Finding("sleep", "none")
registry.CHECKS = (Check("sleep", look, "none", "none"),)
cli.main()
"""


@pytest.mark.ranks
def test_real_ranks_that_a_launcher_started(program: Any) -> None:
    first, other = program.run_ranks(2, "doctor", DEBUG, "--only", *LOCAL, "ring", "clock")
    assert "MASTER_ADDR" in first.out
    assert "right" in first.out
    assert other.out == ""


@pytest.mark.ranks
@pytest.mark.parametrize(("what", "limit"), [("time.sleep(600)", 2), ("os._exit(1)", 60)])
def test_a_rank_that_hangs_or_dies_ends_all_with_1(program: Any, tmp_path: Path, what: str, limit: int) -> None:
    script, bad = tmp_path / "ill.py", tmp_path / "bad"
    script.write_text(HANGS.format(what=what))
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": program.free_port()}
    shared |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    words, launcher = ["doctor", "--limit", limit, "--bad-nodes", bad], (sys.executable, str(script))
    own = [shared | {"RANK": rank, "LOCAL_RANK": rank, "SLURMD_NODENAME": f"node{rank}"} for rank in range(2)]
    jobs = [program.start(*words, launcher=launcher, variables=each) for each in own]
    try:
        assert [job.wait() for job in jobs] == [1, 1], jobs[0].said
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert "check sleep: rank 1 on node1 died or hangs in it" in jobs[0].err
    if "sleep(" in what:
        assert "rank 1 on node1 hangs in check sleep for 2 s" in jobs[1].err
    assert [each.name for each in bad.iterdir()] == ["node1"]


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURMD_NODENAME", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
