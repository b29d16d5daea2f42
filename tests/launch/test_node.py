"""`pretrain launch node`: where a node stands, how its ranks end, and a run that goes on from its bucket alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import errors
from pretrain.launch import node
from pretrain.launch.node import Node, Place, place

ONE = Place(1, 0, 3, "127.0.0.1", 1)
TRAINER = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "a-node-0-0.a"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_GPUS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        (TRAINER | {"PET_MASTER_PORT": "29400"}, Node(), Place(2, 1, 8, "a-node-0-0.a", 29400)),
        (SKY | {"SKYPILOT_NODE_IPS": "10.0.0.3\n10.0.0.4\n"}, Node(), Place(2, 0, 4, "10.0.0.3", 29500)),
        ({"JOB_COMPLETION_INDEX": "1"}, Node(nodes=2, ranks_per_node=2, head="n"), Place(2, 1, 2, "n", 29500)),
        (TRAINER, Node(node=0, ranks_per_node=2, head="n", port=5), Place(2, 0, 2, "n", 5)),
    ],
)
def test_where_a_node_stands(environment: dict[str, str], options: Node, expected: Place) -> None:
    assert place(options, environment) == expected


def test_one_node_takes_a_free_port() -> None:
    first, second = (place(Node(ranks_per_node=2), {}) for _ in range(2))
    assert (first.nodes, first.node, first.ranks, first.head) == (1, 0, 2, "127.0.0.1")
    assert first.port != second.port


@pytest.mark.parametrize(
    ("environment", "options", "said"),
    [
        ({}, Node(), "say how many ranks this node runs"),
        (
            {"PET_NPROC_PER_NODE": "auto"},
            Node(),
            "PET_NPROC_PER_NODE 'auto' is no number; say it with --ranks-per-node",
        ),
        ({}, Node(ranks_per_node=0), "ranks_per_node 0"),
        ({}, Node(ranks_per_node=1, nodes=2, node=2, head="n"), "node 2 of 2: nodes count from 0"),
        ({}, Node(ranks_per_node=1, nodes=2), "name node 0 with --head"),
    ],
)
def test_what_is_missing_is_said(environment: dict[str, str], options: Node, said: str) -> None:
    with pytest.raises(errors.UserError, match=said):
        place(options, environment)


def test_what_a_rank_is_told() -> None:
    told = Place(2, 1, 8, "n", 5).environment(3)
    expected = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert told == expected | {"MASTER_ADDR": "n", "MASTER_PORT": "5"}


def python(code: str) -> list[str]:
    """A rank that needs no torch; `rank` is its number."""
    return [sys.executable, "-c", f"import os, signal, sys, time; rank = int(os.environ['RANK']); {code}"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(0)", errors.DONE),
        ("sys.exit(2)", errors.USER_ERROR),
        ("sys.exit(85)", errors.REQUEUE),
        ("time.sleep(0.5 * (rank != 1)); sys.exit(2 if rank == 1 else 1)", errors.USER_ERROR),
        ("time.sleep(0.5 * (rank != 1)); rank == 1 and os.kill(os.getpid(), 9); sys.exit(1)", 137),
        ("time.sleep(0.5 * (rank == 1)); sys.exit(7 * (rank == 1))", 7),
    ],
)
def test_a_node_ends_with_the_code_of_the_run(code: str, expected: int) -> None:
    assert node.run(ONE, python(code), os.environ) == expected


def test_ranks_do_not_wait_for_ever_for_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "LAST_S", 0.2)
    assert node.run(ONE, python("rank == 1 and sys.exit(3); time.sleep(600)"), os.environ) == 3


@pytest.mark.parametrize("handler", ["signal.signal(15, lambda *_: sys.exit(85))", "pass"])
def test_a_signal_is_passed_on(handler: str, tmp_path: Path) -> None:
    """Also to ranks that cannot hear it yet, which lose nothing."""
    ready = f"open(r'{tmp_path}/' + str(rank), 'w').close()"

    def ask() -> None:
        while len(list(tmp_path.iterdir())) < ONE.ranks:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=ask).start()
    assert node.run(ONE, python(f"{handler}; {ready}; time.sleep(600)"), os.environ) == errors.REQUEUE
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_node_asked_to_stop_starts_nothing() -> None:
    ranks = node.Ranks()
    ranks.tell(signal.SIGTERM, None)
    ranks.start(python("sys.exit(1)"), os.environ)
    assert ranks.wait() == errors.REQUEUE


@pytest.mark.slow
def test_a_run_goes_on_where_only_the_bucket_is_left(program: Any, tmp_path: Path) -> None:
    """As in a pod or on a machine that comes instead of another: the folder of the run is empty."""
    bucket = ("--checkpoint.to", f"local://{tmp_path}/bucket")
    knobs = ("--train.samples", 1280, "--log.every-steps", 1, "--checkpoint.every-steps", "None")
    words = ("launch", "node", "configs/debug.yaml", "--ranks-per-node", 1, *knobs)
    run = tmp_path / "first" / "debug"
    with program.start(*words, *bucket, "--folder", tmp_path / "first") as first:
        program.until_step(first, run, 3)
        first.send_signal(signal.SIGTERM)
        assert first.wait() == errors.REQUEUE, first.said
    assert not list(run.rglob("*.safetensors"))
    program.run(*words, *bucket, "--folder", tmp_path / "second")
    began = program.events(tmp_path / "second" / "debug", "start")
    stopped = program.events(run, "stopped")
    assert began[0]["step"] == stopped[0]["step"] > 0
    program.run(*words, "--folder", tmp_path / "undisturbed")
    undisturbed = program.tensors(tmp_path / "undisturbed" / "debug")
    assert undisturbed
    assert program.tensors(tmp_path / "bucket" / "debug") == undisturbed
