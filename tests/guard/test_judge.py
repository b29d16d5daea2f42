"""When a step is left out: by numbers, on every rank alike, and the same after a checkpoint."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.guard.judge import WARM_UP, WINDOW, Judge
from pretrain.guard.record import LOOK, Record
from pretrain.values import GradNorms
from pretrain.world import World

ONE = World(0, 1, 0, torch.device("cpu"))


def keeps(judge: Judge, loss: float, norm: float = 1.0) -> bool:
    value = torch.tensor(norm)
    return bool(judge.of(torch.tensor(loss))(GradNorms(value, value, value)))


def noise(steps: int, seed: int = 0) -> list[float]:
    return (2 + 0.1 * torch.randn(steps, generator=torch.Generator().manual_seed(seed))).tolist()


def test_limits_are_mean_and_deviations_of_the_last_steps_taken() -> None:
    judge, taken = Judge(6.0, ONE), noise(WINDOW + 40)
    assert all(keeps(judge, loss) for loss in taken)
    last = [float(torch.tensor(loss)) for loss in taken[-WINDOW:]]
    limit = statistics.fmean(last) + 6 * statistics.pstdev(last)
    assert not keeps(judge, limit + 1e-5)
    assert judge.verdicts()[-1].max_loss == pytest.approx(limit, rel=1e-9)
    assert keeps(judge, limit - 1e-5), "what was left out is not in the window"


def test_a_gradient_spike_is_one_and_a_fall_is_none() -> None:
    judge = Judge(6.0, ONE)
    for loss in noise(WARM_UP):
        keeps(judge, loss, norm=loss)
    assert not keeps(judge, 2.0, norm=10.0)
    assert keeps(judge, 0.1, norm=0.1)
    assert [verdict.reason for verdict in judge.verdicts()[WARM_UP:]] == ["the gradient spikes", None]


def test_spikes_are_judged_after_the_warm_up_and_numbers_that_are_none_always() -> None:
    judge = Judge(6.0, ONE)
    assert not keeps(judge, math.nan)
    assert not keeps(judge, 1.0, norm=math.inf)
    for loss in noise(WARM_UP - 1):
        assert keeps(judge, loss)
    assert keeps(judge, 100.0), "one step short of the warm-up"
    reasons = [verdict.reason for verdict in judge.verdicts()]
    assert reasons[:2] == ["the loss is not finite", "the gradient is not finite"]
    assert set(reasons[2:]) == {None}


def test_rounding_is_no_spike_and_none_judges_no_spikes() -> None:
    judge, lenient = Judge(6.0, ONE), Judge(None, ONE)
    for _ in range(WARM_UP):
        assert keeps(judge, 1.0)
        assert keeps(lenient, 1.0)
    assert keeps(judge, 1.005), "within 6 thousandths of a loss that never moved"
    assert not keeps(judge, 1.01)
    assert keeps(lenient, 1e9)
    assert not keeps(lenient, math.nan)


def test_a_judge_goes_on_as_it_was() -> None:
    judge, other = Judge(6.0, ONE), Judge(6.0, ONE)
    for loss in noise(WINDOW + 7):
        keeps(judge, loss)
    judge.verdicts()
    other.load({name: tensor.clone() for name, tensor in judge.state().items()})
    for loss in [*noise(50, seed=1), 50.0, math.nan]:
        assert keeps(judge, loss) == keeps(other, loss)
    assert str(judge.verdicts()) == str(other.verdicts()), "bit for bit"
    assert all(torch.equal(one, other.state()[name]) for name, one in judge.state().items())


def judged_by_ranks(losses: list[list[float]], norms: list[list[float]]) -> list[Any]:
    rank = dist.get_rank()
    judge = Judge(6.0, World(rank, dist.get_world_size(), rank, torch.device("cpu")))
    kept = [keeps(judge, loss, norm) for loss, norm in zip(losses[rank], norms[rank], strict=True)]
    return [kept, str(judge.verdicts())]


@pytest.mark.ranks
def test_all_ranks_decide_what_one_process_does(ranks: Any) -> None:
    """By the mean over ranks; a loss that is no number on one rank, or a norm that differs, is so for all."""
    steps = noise(60)
    losses = [[loss + shift for loss in steps] + [math.nan, 9.0, 2.0] for shift in (-0.5, 0.5)]
    losses[1][60] = 2.0
    norms = [[1.0] * 62 + [1.0], [1.0] * 62 + [math.inf]]
    one, other = ranks(2).run(judged_by_ranks, losses, norms)
    assert one == other
    assert one[0] == [True] * 60 + [False] * 3
    alone = Judge(6.0, ONE)
    assert [keeps(alone, sum(pair) / 2) for pair in zip(*losses, strict=True)][:62] == one[0][:62]


def test_trouble_is_seen_at_fixed_steps_whatever_is_logged() -> None:
    record = Record()
    record.add(20, [11, 12, 13])
    assert record.trouble(20, patience=3, done=False) is None
    assert record.trouble(20, patience=3, done=True) is not None, "at the end of the run"
    found = record.trouble(LOOK, patience=3, done=False)
    assert found is not None
    assert found.steps == (11, 12, 13)
    assert record.trouble(LOOK, patience=4, done=False) is None
    again = Record()
    again.load(record.facts())
    assert again.facts() == record.facts()
    again.add(11 + WINDOW, [])
    assert again.recent == (12, 13), "those among the last 128 steps"
    assert again.skipped == 3
    assert found.stretch(8, ()) == (80, 104)
    assert found.stretch(8, ((40, 56),)) == (96, 120), "positions in the data order, past what is left out already"
