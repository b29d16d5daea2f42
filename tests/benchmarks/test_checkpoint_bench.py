"""The benchmark of checkpoints measures both sides, and leaves nothing behind."""

from pathlib import Path

import pytest

from benchmarks import checkpoint


def test_both_sides_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--out", str(tmp_path / "results"), "--folder", str(tmp_path), "--threads", "1"]
    found = checkpoint.main(["--millions", "0.1", "--rounds", "1", *where])
    told = {(record.case.rpartition(" ")[2], record.metric): record.value for record in found}
    assert {side for side, _ in told} == {"ours", "torch.save"}
    assert all(value > 0 for value in told.values())
    assert told["ours", "share_of_30_min"] == pytest.approx(100 * told["ours", "blocked_s"] / 1800)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
