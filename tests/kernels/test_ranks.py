"""Ranking in blocks against the whole matrix, ties included."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.evaluate import ops


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for item in tree_leaves(made):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel(), item.untyped_storage().nbytes() // item.element_size())
        return made


def brute_force(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """[Q] probability of a relevant candidate among the first k: the mean over all orders of equal scores, counted."""
    found = []
    for row, good in zip(scores, relevant, strict=True):
        hits = 0.0
        orders = list(itertools.permutations(range(len(row))))
        for order in orders:
            ranked = sorted(range(len(row)), key=lambda n: (-row[n].item(), order[n]))
            hits += any(bool(good[n]) for n in ranked[:k])
        found.append(hits / len(orders))
    return torch.tensor(found, dtype=torch.float64)


def pairs_of(relevant: Tensor) -> ops.Relevance:
    query, candidate = relevant.nonzero().unbind(1)
    order = torch.randperm(len(query))
    return ops.Relevance.of(query[order], candidate[order])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_recall_with_ties_is_the_mean_over_all_orders(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setattr(ops, "CANDIDATE_BLOCK", 2)
    monkeypatch.setattr(ops, "QUERY_BLOCK", 3)
    queries = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    candidates = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    relevant = torch.tensor(
        [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    )
    found = ops.standing(queries, candidates, pairs_of(relevant)).recall(k)
    torch.testing.assert_close(found, brute_force(queries @ candidates.T, relevant, k), rtol=0, atol=1e-12)


def test_expected_rank_with_ties() -> None:
    standing = ops.Standing(torch.tensor([0, 2, 0]), torch.tensor([0, 1, 3]), torch.tensor([1, 1, 2]))
    assert standing.rank().tolist() == [1.0, 3.5, 2.0]


@pytest.mark.parametrize(("queries", "candidates"), [(1, 1), (300, 300), (257, 2500), (3, 5000)])
def test_one_to_one_equals_the_usual_formula(queries: int, candidates: int) -> None:
    """open_clip's get_clip_metrics: the place of the partner in the sorted row."""
    rows, columns = normalize(torch.randn(queries, 16), dim=1), normalize(torch.randn(candidates, 16), dim=1)
    partner = torch.randperm(candidates)[:queries]
    found = ops.standing(rows, columns, ops.Relevance.of(torch.arange(queries), partner))
    ranking = torch.argsort(rows.double() @ columns.double().T, dim=1, descending=True)
    place = (ranking == partner[:, None]).nonzero()[:, 1]
    assert found.rank().tolist() == (place + 1.0).tolist()
    for k in (1, 5, 10):
        assert found.recall(k).tolist() == (place < k).double().tolist()


def test_several_relevant_candidates_equal_clip_benchmarks_formula() -> None:
    """A hit is a relevant candidate among the first k."""
    rows, columns, relevant = torch.randn(40, 8), torch.randn(200, 8), torch.rand(40, 200) < 0.02
    relevant[torch.arange(40), torch.arange(40)] = True
    found = ops.standing(rows, columns, pairs_of(relevant))
    for k in (1, 5, 10):
        top = (rows.double() @ columns.double().T).topk(k, dim=1).indices
        assert found.recall(k).tolist() == relevant.gather(1, top).any(1).double().tolist()


def test_a_collapsed_tower_gets_the_recall_of_guessing() -> None:
    same = normalize(torch.randn(1, 48), dim=1).expand(500, -1)
    found = ops.standing(same, same, ops.Relevance.of(torch.arange(500), torch.arange(500)))
    assert found.greater.tolist() == [0] * 500
    assert math.isclose(found.recall(10).mean(), 10 / 500, rel_tol=1e-9)
    assert math.isclose(found.rank().mean(), 501 / 2, rel_tol=1e-9)


def test_equal_candidates_score_equal_wherever_they_stand() -> None:
    candidates = normalize(torch.randn(997, 61), dim=1)
    candidates[torch.tensor([3, 500, 996])] = candidates[0].clone()
    scores = ops.rounded_scores(normalize(torch.randn(31, 61), dim=1), candidates)
    assert all(torch.equal(scores[:, n], scores[:, 0]) for n in (3, 500, 996))


def test_nothing_the_size_of_the_logits() -> None:
    rows, columns = normalize(torch.randn(3000, 8), dim=1), normalize(torch.randn(4000, 8), dim=1)
    relevance = ops.Relevance.of(torch.arange(3000), torch.arange(3000))
    with Largest() as seen:
        ops.standing(rows, columns, relevance)
    assert 0 < seen.elements <= ops.QUERY_BLOCK * ops.CANDIDATE_BLOCK
    assert seen.elements < 3000 * 4000 / 10


def test_a_query_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="query 1 of this block"):
        ops.standing(torch.eye(2), torch.eye(2), ops.Relevance.of(torch.tensor([0]), torch.tensor([1])))


def test_no_queries() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert len(ops.standing(torch.empty(0, 4), torch.eye(4), ops.Relevance.of(empty, empty)).recall(1)) == 0
