"""Two ranks that evaluate, one of which stands still: the other ends by itself, and names it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from pretrain import cli, errors
from pretrain.drill.ranks import Ranks

pytestmark = pytest.mark.slow
TIMEOUT_S = 12.0


def test_a_rank_of_an_evaluation_that_stops(tmp_path: Path) -> None:
    few = ("--train.samples", "64", "--train.threads", "1")
    assert cli.run(["train", "configs/debug.yaml", "--folder", str(tmp_path), *few]) == errors.DONE
    words = ["evaluate", str(tmp_path / "debug"), "--task", "retrieval", "--timeout-s", f"{TIMEOUT_S}"]
    # Inside the first of these phases the rank waits until a heartbeat has told of it, and stops at the next.
    fault = "slow@evaluating:nth=2:times=1:value=6:rank=1,pause@evaluating:nth=3:rank=1"
    with Ranks(words, tmp_path / "said", 2, fault, fresh=True) as ranks:
        (waits, stopped), pid = ranks.wait(grace_s=2.0), ranks.pids[1]
        assert (waits, stopped, ranks.abandoned) == ("failed", "SIGKILL", {1}), ranks.said(0)
        report = (
            f"rank 1 ({socket.gethostname()}, pid {pid}) is stopped by a signal (SIGSTOP); it was in phase evaluating"
        )
        assert f"the run stands still: {report}" in ranks.said(0)
        assert "Traceback" not in ranks.said(0)
        folder = tmp_path / "debug" / "eval" / "retrieval"
        first = json.loads((folder / "stalls.jsonl").read_text().splitlines()[0])
        assert (first["behind"], first["told_by"]) == ([1], 0)
        assert cli.run(["ranks", str(folder)]) == errors.DONE
