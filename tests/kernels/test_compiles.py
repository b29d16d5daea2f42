"""Triton's compiler takes the kernels for GPUs that are not here. In processes of their own: here triton interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pretrain.kernels.compiled", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_hopper_gets_its_own_matrix_instructions_pipelined_and_without_spills():
    found = compiled("--capability", "90", "--only", "bfloat16 512")
    assert len(found) >= 6
    for need in found:
        assert need["wgmma"] > 0, need
        assert need["mma"] == 0, need
        assert need["cp_async"] > 0, need
        assert need["stack_bytes"] == 0, need
        assert need["shared_bytes"] * (2 if " w4 " in need["tile"] else 1) <= 227 * 1024, need


@pytest.mark.slow
def test_ragged_edges_and_ids_compile_for_ampere():
    """All combinations, for both, are a quarter of an hour: `python -m pretrain.kernels.compiled --all`."""
    found = compiled("--capability", "80", "--all", "--only", "float16 768 (300, 517) positives True")
    kernels = {need["kernel"].split()[0] for need in found}
    assert kernels == {"softmax_sums", "softmax_maxima", "softmax_gradients", "sigmoid_sweep"}
    for need in found:
        assert need["mma"] > 0, need
        assert need["shared_bytes"] <= 99 * 1024, need
        assert need["stack_bytes"] <= 128, need
