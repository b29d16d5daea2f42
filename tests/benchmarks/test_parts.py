"""What benchmarks are made of: peers that compute the same, links that take their time, timings, pictures, one file."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import measure, merge, peers, pictures
from benchmarks.emulated import SleepingLink
from benchmarks.inf_cl import inf_cl_loss
from benchmarks.measure import Timing
from benchmarks.peers import Case

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
CPU = torch.device("cpu")


def gradients(loss, tensors):
    total = loss(*tensors)
    return total.detach(), *torch.autograd.grad(total, tensors)


@pytest.mark.parametrize("size", [1, 7, 300])
def test_inf_cl_restated_is_the_same_loss(size):
    inputs = Case("clip", size, 24, torch.float32).inputs(CPU)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, wanted = gradients(inf_cl_loss, inputs), gradients(peers.materialised_clip, wide)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def test_inf_cl_restated_spans_tiles(monkeypatch):
    monkeypatch.setattr("pretrain.kernels.tiling.CPU_TILE", 16)
    test_inf_cl_restated_is_the_same_loss(50)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_all_sides_compute_one_loss(loss):
    case = Case(loss, 40, 16, torch.float32)
    inputs = case.inputs(CPU)
    found = {side: gradients(function, inputs) for side, function in peers.sides(case, CPU).items()}
    assert {"ours", "open_clip_eager", "materialised"} <= found.keys()
    for side in found.values():
        for one, other in zip(side, found["open_clip_eager"], strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-6)


def waited(post_first):
    """Seconds of a message and a compute of a tenth of a second each."""
    link, source, target = SleepingLink(bytes_per_s=1e4), torch.ones(250), torch.zeros(250)
    start = time.perf_counter()
    if post_first:
        work = link.move([(target, source)], 1000)
    time.sleep(0.1)
    if not post_first:
        work = link.move([(target, source)], 1000)
    work.wait()
    assert torch.equal(target, source)
    return time.perf_counter() - start


def test_a_message_posted_before_compute_hides_behind_it():
    assert waited(post_first=False) >= 0.2
    assert min(waited(post_first=True) for _ in range(3)) < 0.19


def test_a_link_carries_one_message_after_another():
    link, one = SleepingLink(bytes_per_s=1e4, latency_s=0.01), torch.ones(1)
    start = time.perf_counter()
    for work in [link.move([(torch.empty(1), one)], 200) for _ in range(3)]:
        work.wait()
    assert time.perf_counter() - start >= 3 * 0.03 - 1e-3


def test_timings():
    timing = Timing.of([float(n) for n in range(1, 12)])
    assert (timing.median, timing.p10, timing.p90, timing.count) == (6, 2, 10, 11)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "ab"}
    found = measure.interleaved(calls, 3, CPU)
    assert turns == ["a", "b"] * 4
    assert {name: timing.count for name, timing in found.items()} == {"a": 3, "b": 3}


def test_without_a_gpu_there_are_no_clocks(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measure.clocks() == {}


def test_rows_are_of_unit_norm_and_reproducible():
    rows = measure.unit_rows(5, 8, CPU, torch.float32, 1)
    assert_close(rows.norm(dim=1), torch.ones(5))
    assert torch.equal(rows, measure.unit_rows(5, 8, CPU, torch.float32, 1))
    assert not torch.equal(rows, measure.unit_rows(5, 8, CPU, torch.float32, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted here, compiled there")
@pytest.mark.parametrize("count", [1, 8192, 20000])
def test_the_throttled_copy_copies(count):
    pytest.importorskip("triton")
    from benchmarks.throttled_copy import throttled_copy

    source, target = torch.randn(count), torch.zeros(count)
    throttled_copy(target, source, programs=2, spin=3, delay=torch.zeros(2))
    assert torch.equal(target, source)


def results(folder, dirty=False):
    """A file like a benchmark's."""
    found = [
        {"bench": "loss", "case": f"{loss} B={size} d=512 float32", "metric": f"{side}{metric}", "value": size * 1e-3,
         "unit": "s"}
        for loss in ("clip", "siglip")
        for size in (2048, 8192)
        for side in ("", "open_clip_eager_")
        for metric in ("forward_backward_seconds", "extra_memory_bytes")
    ]  # fmt: skip
    header = {"device": "cpu", "gpu": None, "cpu": "a CPU", "threads": 2, "versions": {"torch": "2.13"},
              "commit": "abc", "dirty": dirty, "skipped": []}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss_cpu.json").write_text(json.dumps({"header": header, "records": found}))


def test_pictures_are_the_same_whenever_they_are_drawn(tmp_path):
    results(tmp_path / "results")
    where = ["--results", str(tmp_path / "results"), "--pictures", str(tmp_path / "pictures")]
    assert pictures.main([*where, "--check"]) == 1
    assert pictures.main(where) == 0
    assert pictures.main([*where, "--check"]) == 0
    drawn = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert drawn == ["loss_memory_cpu.svg", "loss_time_cpu.svg"]
    results(tmp_path / "results", dirty=True)
    assert pictures.compare(pictures.drawn(tmp_path / "results"), tmp_path / "pictures") == drawn


def test_committed_pictures_are_fresh():
    assert pictures.compare(pictures.drawn(pictures.RESULTS), pictures.PICTURES) == [], "python -m benchmarks.pictures"


def dry_run(**environment):
    command = ["bash", str(SCRIPT), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_for_a_gpu_stays_below_eight_minutes():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    said = dry_run()
    parts = {name: int(seconds) for name, seconds in re.findall(r"^== (\w+), at most (\d+) s:", said, re.MULTILINE)}
    total = int(re.findall(r"^== at most (\d+) s in all", said, re.MULTILINE)[0])
    assert sum(parts.values()) == total < 480
    kernels = {path.parent.name for path in ROOT.glob("kernels/*/bench.py")}
    assert {"loss", "overlap", "step"} | kernels <= parts.keys()
    for path in ROOT.glob("tests/**/test_*.py"):
        # Every file that has such a test is named, and so collected.
        marked = re.search(r"^(@|pytestmark = )pytest\.mark\.gpu", path.read_text(), re.MULTILINE)
        assert not marked or str(path.relative_to(ROOT)) in said


def test_without_pytest_the_script_says_that_tests_did_not_run():
    assert "tests DID NOT RUN: pytest is not installed" in dry_run(PYTHON="/bin/false")


STUB = """#!/bin/sh
# Stands for Python: benchmarks.overlap fails, benchmarks.step takes too long, everything else prints its arguments.
case "$*" in
  *"-m benchmarks.merge"*) mkdir -p "$4" && cp "$3/outcomes.json" "$4/gpu_stub.json" ;;
  *"-m benchmarks.overlap"*) exit 3 ;;
  *"-m benchmarks.step"*) sleep 30 ;;
  *) echo "$@" ;;
esac
"""


def test_a_part_that_fails_stops_no_other_and_is_told(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "kernels" / "ranks").mkdir(parents=True)
    (tmp_path / "kernels" / "ranks" / "bench.py").touch()
    (tmp_path / "tests").mkdir()
    script, stub, out = tmp_path / "benchmarks" / "gpu.sh", tmp_path / "stub", tmp_path / "out"
    script.write_text(SCRIPT.read_text().replace("part step 75", "part step 1"))
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "OUT": str(out)}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    outcomes = json.loads((out / "gpu_stub.json").read_text())
    codes = {name: said.split(" after")[0] for name, said in outcomes.items()}
    assert codes == {"tests": "exit 0", "loss": "exit 0", "overlap": "exit 3", "step": "exit 124", "ranks": "exit 0"}
    assert "== step ran out of its 1 s; what it had written by then counts" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["gpu_stub.json", "parts.tar.gz"]


def test_parts_become_one_file(tmp_path):
    results(tmp_path)
    (tmp_path / "outcomes.json").write_text('{"loss": "exit 0 after 9 s"}')
    (tmp_path / "ranks.table").write_text(
        "loading\n| ms | argsort | triton |\n|---|---|---|\n| Q=5 | 2 | |\n| Q=9 | 3 | 0.5 |\n"
    )
    path = merge.main([str(tmp_path), str(tmp_path / "out")])
    content = json.loads(path.read_text())
    assert content["header"]["outcomes"] == {"loss": "exit 0 after 9 s"}
    tables = [tuple(record.values()) for record in content["records"] if record["bench"] == "kernels.ranks"]
    assert tables == [
        ("kernels.ranks", "Q=5", "argsort", 2, "ms"),
        ("kernels.ranks", "Q=9", "argsort", 3, "ms"),
        ("kernels.ranks", "Q=9", "triton", 0.5, "ms"),
    ]
    assert len(content["records"]) == 3 + 16
