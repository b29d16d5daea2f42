"""Every benchmark runs at a tiny size, and its records can be read by a program."""

import json
import math

import pytest
import torch

from benchmarks import fit, loss, memory, overlap, peers, rectangles, report, step
from benchmarks.emulated import EmulatedTransport, InstantLink
from benchmarks.report import Budget
from pretrain import exchange
from pretrain.plan.communication import Case, bytes_sent
from pretrain.plan.loss import extra_memory_bytes

CPU = torch.device("cpu")
ONCE = ["--rounds", "1", "--threads", "1"]
UNITS = {"s", "1", "B", "FLOP/s", "samples/s", "ms"}


def checked(folder, name):
    """The file's content, once it is known to have the shape that everything else relies on."""
    content = json.loads((folder / f"{name}_cpu.json").read_text())
    assert {"device", "versions", "clocks", "commit", "dirty", "command", "skipped", "threads"} <= content[
        "header"
    ].keys()
    assert content["header"]["device"] == "cpu"
    for record in content["records"]:
        assert list(record) == ["bench", "case", "metric", "value", "unit"]
        assert record["unit"] in UNITS
        assert math.isfinite(record["value"]), record
    return content


def values(content, case):
    return {record["metric"]: record["value"] for record in content["records"] if record["case"] == case}


@pytest.mark.slow
def test_loss(tmp_path):
    loss.main([*ONCE, "--sizes", "64", "--widths", "32", "--out", str(tmp_path)])
    content = checked(tmp_path, "loss")
    clip, siglip = (values(content, f"{name} B=64 d=32 float32") for name in ("clip", "siglip"))
    both = ("ratio_to_open_clip_eager", "forward_ratio_to_open_clip_eager", "ratio_to_materialised",
            "forward_backward_share_of_matmul_peak", "forward_share_of_matmul_peak",
            "open_clip_eager_forward_backward_seconds_p90", "matmul_peak_before")  # fmt: skip
    assert all(found[metric] > 0 for found in (clip, siglip) for metric in both)
    assert clip["ratio_to_inf_cl"] > 0
    assert "ratio_to_inf_cl" not in siglip
    for name in ("loss", "d_image", "d_text", "d_scale"):
        for side in ("", "open_clip_eager_", "materialised_", "inf_cl_"):
            assert clip[f"{side}{name}_error"] < 1e-5
        assert siglip[f"{name}_error"] < 1e-5
    assert siglip["d_bias_error"] < 1e-5


def test_a_large_case_is_measured_in_one_call(tmp_path):
    asked = report.Parser("loss", "").parse_args(["--out", str(tmp_path)])
    running = loss.Running(report.Report.of("loss", asked), CPU)
    running.take_once(peers.Case("clip", 64, 32, torch.float32))
    found = values(checked(tmp_path, "loss"), "clip B=64 d=32 float32")
    assert found["forward_backward_seconds"] == found["forward_backward_seconds_p90"] > 0
    assert "forward_seconds" not in found


@pytest.mark.slow
def test_memory_is_what_counting_predicts():
    wanted = [(peers.Case(name, 2048, 128, torch.float32), ["ours", "open_clip_eager"]) for name in ("clip", "siglip")]
    for (case, _), found in zip(wanted, memory.apart(wanted, threads=1), strict=True):
        predicted = extra_memory_bytes(case.loss, 2048, 2048, 128)
        assert found["ours"] == pytest.approx(predicted, rel=0.05)
        assert found["ours"] < 2048 * 2048 * 4 < found["open_clip_eager"]


def test_a_budget_skips_and_says_so(tmp_path, capsys):
    loss.main([*ONCE, "--sizes", "64", "--budget-s", "0", "--out", str(tmp_path)])
    content = checked(tmp_path, "loss")
    assert content["records"] == []
    assert "ours at clip B=64 d=512 float32: about 0 s would not fit" in content["header"]["skipped"][0]
    assert "skipped ours at clip" in capsys.readouterr().err


def test_overlap(tmp_path):
    small = ["--rows", "32", "--width", "16", "--ranks", "4", "--layers", "1", "--link-gb-s", "0.05"]
    overlap.main([*ONCE, *small, "--out", str(tmp_path)])
    content = checked(tmp_path, "overlap")
    size = "W=4 b=32 d=16 sleeping 0.05 GB/s"
    for name in exchange.names():
        if name == "local":
            continue
        found = values(content, f"emulated {name}, {size}")
        assert found["sent_bytes"] == bytes_sent(name, Case(4, 32, 16, bytes_each=4)), name
        assert found["contention"] > 0
    assert {"before", "after"} == {
        record["case"].split()[3] for record in content["records"] if record["case"].startswith("emulated hop")
    }
    assert values(content, f"emulated gather behind a tower, {size}")["both_seconds"] > 0
    assert values(content, "cost model, both, 9 shapes")["rate"] > 0


@pytest.mark.slow
def test_step(tmp_path):
    step.main([*ONCE, "--batch", "4", "--out", str(tmp_path)])
    content = checked(tmp_path, "step")
    for model in ("digits-vit", "debug-tiny"):
        for speed in ("causal", "short_texts"):
            found = values(content, f"{model} B=4 fp32, {speed}")
            assert found["ratio_to_open_clip_eager"] > 0
            assert 0 < found["mfu"] < 1
        assert values(content, f"{model} B=4 fp32, open_clip eager")["samples_per_s"] > 0


def test_rectangles():
    found = rectangles.grid([(16, 64, 8), (64, 16, 8)], CPU, Budget(60), rounds=1)
    assert [(one.rows, one.columns) for one in found] == [(16, 64)]
    assert all(record.value > 0 for record in rectangles.described(found[0], CPU) if record.unit == "s")


def test_the_emulated_transport_brings_back_what_was_sent():
    way = EmulatedTransport(3, InstantLink(), CPU)
    own, gathered, coming = torch.arange(4.0).view(2, 2), torch.empty(6, 2), torch.empty(2, 2)
    way.all_gather(gathered, own).wait()
    assert torch.equal(gathered, own.repeat(3, 1))
    way.swap([(own, 1)], [(coming, 2)]).wait()
    assert torch.equal(coming, own)
    way.reduce_scatter(coming, gathered + 1).wait()
    assert torch.equal(coming, own + 1)
    assert way.sent == 2 * 16 + 16 + 2 * 16
    inside, across = EmulatedTransport(6, InstantLink(), CPU).split(2)
    assert (inside.size, across.size) == (2, 3)


def test_the_fit_finds_rate_and_start():
    points = [(operations, operations / 5e12 + 1e-4) for operations in (1e9, 3e9, 1e10, 4e10, 1e11, 7e11)]
    model, errors = fit.held_out(points)
    assert model.rate == pytest.approx(5e12, rel=1e-6)
    assert model.start == pytest.approx(1e-4, rel=1e-6)
    assert max(errors) < 1e-9
    assert len(errors) == 2
    with pytest.raises(ValueError, match="2 points do not tell a rate from a start"):
        fit.fit([(1e9, 1.0), (1e9, 1.1)])


def test_a_fit_never_starts_before_nothing():
    assert fit.fit([(1e9, 1e-4), (1e10, 2e-3), (1e11, 3e-2)]).start == 0


def test_the_delay_that_slows_a_copy_down_is_found():
    asked = []

    def rate(spin):
        asked.append(spin)
        return 1000 / (1 + spin)

    spin = overlap.slowed(rate, target=9.0)
    assert rate(spin) == pytest.approx(9.0, rel=0.05)
    assert len(asked) < 25
    assert overlap.slowed(rate, target=2000) == 0


def test_records_are_told_apart_from_a_dirty_tree(tmp_path, monkeypatch, capsys):
    asked = report.Parser("loss", "").parse_args(["--out", str(tmp_path)])
    monkeypatch.setattr(report, "dirty_tree", lambda: True)
    found = report.Report.of("loss", asked)
    found.add([report.Record("loss", "one", "seconds", 1.0, "s")])
    found.finish()
    assert checked(tmp_path, "loss")["header"]["dirty"] is True
    assert "from a tree with changes that are not committed" in capsys.readouterr().out
