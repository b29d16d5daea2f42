"""What all ranks together tell, how it is told, and whom it names: pure functions of what each rank found."""

from __future__ import annotations

import pytest
import torch

from pretrain.doctor import clock, examination, judge, report
from pretrain.doctor.base import Finding, Patient
from pretrain.world import World

NODES = ("a", "a", "b", "b")


def hashes(*values: str, **more: object) -> list[list[Finding]]:
    return [[Finding("matmul", value, alike=value, mend="leave it out", **more)] for value in values]  # type: ignore[arg-type]


def speeds(*values: float) -> list[list[Finding]]:
    return [[Finding("disk", "/x", amount=value, unit="MB/s", least=0.1)] for value in values]


def statuses(found: list[list[Finding]]) -> list[str]:
    return [finding.status for (finding,) in judge.judged(found)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [("xxxx", "ok ok ok ok"), ("xxxy", "ok ok ok fail"), ("xxyy", "fail fail fail fail"), ("x", "ok"),
     ("xy", "fail fail")],
)  # fmt: skip
def test_who_differs_from_more_than_half_fails(values: str, expected: str) -> None:
    assert statuses(hashes(*values)) == expected.split()


def test_a_difference_may_be_a_warning_but_never_betters_a_finding() -> None:
    assert statuses(hashes(*"xxy", unlike="warn")) == ["ok", "ok", "warn"]
    assert statuses(hashes(*"xxy", unlike="warn", status="fail")) == ["fail"] * 3


def test_unlike_devices_are_not_compared() -> None:
    found = [[Finding("matmul on A", "1", alike="1")], [Finding("matmul on B", "2", alike="2")]]
    assert statuses(found) == ["ok", "ok"]


def test_who_is_far_slower_than_the_median_fails_from_three_ranks_on() -> None:
    assert statuses(speeds(500, 600, 20)) == ["ok", "ok", "fail"]
    assert statuses(speeds(500, 600, 100)) == ["ok", "ok", "ok"]
    assert statuses(speeds(500, 2)) == ["ok", "ok"]
    whatever = [[Finding("disk", "/x", amount=value, least=least)] for value, least in ((500, 0), (600, 0), (20, 0.1))]
    assert statuses(whatever) == ["ok", "ok", "fail"], "what is well by itself counts for the median too"


def test_a_node_is_at_fault_where_a_check_fails_that_does_not_fail_everywhere() -> None:
    checks = {"matmul": "matmul", "disk": "disk"}
    assert judge.bad_nodes(judge.judged(hashes(*"xxxy")), NODES, checks) == ["b"]
    assert judge.bad_nodes(judge.judged(hashes(*"xxyy")), NODES, checks) == [], "who is right cannot be told"
    everywhere = [[Finding("disk", "full", "fail")]] * 4
    assert judge.bad_nodes(everywhere, NODES, checks) == [], "another node would not help"
    first_only = [[Finding("disk", "full", "fail")], [], [], []]
    assert judge.bad_nodes(first_only, NODES, checks) == [], "nobody else has looked"
    both = [[Finding("matmul", "1"), Finding("disk", "full", "fail")], *([[Finding("disk", "ok")]] * 3)]
    assert judge.bad_nodes(both, NODES, checks) == ["a"]


def test_a_failure_under_another_name_of_the_same_check_counts() -> None:
    found = [[Finding("gpu health", "well")]] * 3 + [[Finding("gpu memory", "2 errors", "fail")]]
    assert judge.bad_nodes(found, NODES, {"gpu health": "health", "gpu memory": "health"}) == ["b"]


def told(found: list[list[Finding]], name: str) -> str:
    checks = {name: name}
    judged = judge.judged(found)
    return report.Report(report.lines(judged, NODES, checks), NODES, ()).text()


def test_equal_findings_are_one_line() -> None:
    assert told(hashes(*"xxxx"), "matmul") == "ok    matmul  x (4 ranks)"


def test_a_rank_that_differs_has_its_name_and_what_helps() -> None:
    good, bad, mend = told(hashes(*"xxxy"), "matmul").splitlines()
    assert good == "ok    matmul  x (rank 0 on a, rank 1 on a, rank 2 on b)"
    assert bad == "fail  matmul  y; needed: x on 3 of 4 ranks (rank 3 on b)"
    assert mend.split() == ["mend:", "leave", "it", "out"]


def test_speeds_are_a_range_with_the_slowest_named() -> None:
    assert told(speeds(500, 600, 100, 550), "disk") == "ok    disk  /x, 100 (rank 2 on b) to 600 MB/s (4 ranks)"


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ((0.0, 0.1, -0.2), "ok ok ok"),
        ((0.0, 100.0, 0.1), "ok fail ok"),
        ((0.0, 100.0, 100.1), "fail ok ok"),
        ((0.0, 100.0), "fail fail"),
    ],
)
def test_a_clock_is_right_that_agrees_with_more_than_half(offsets: tuple[float, ...], expected: str) -> None:
    assert [clock.judge(offsets, rank).status for rank in range(len(offsets))] == expected.split()


def test_ranks_that_gloo_misses_are_named() -> None:
    first = Patient(World(0, 4, 0, torch.device("cpu")), NODES)
    said = "[Rank 0]: Ranks 2, 3 failed to pass monitoredBarrier in 1000 ms"
    lost = examination.missing("disk", said, first)
    assert str(lost) == "check disk: rank 2 on b, rank 3 on b died or hangs in it"
    assert lost.nodes == ("b",)
    everywhere = examination.missing("disk", "[Rank 0]: Ranks 1, 2 failed to pass monitoredBarrier in 1 ms", first)
    assert everywhere.nodes == (), "leaving out every node helps nobody"
