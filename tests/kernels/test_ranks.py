"""Every form against the whole matrix, ties included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.kernels.ranks import Relevance, Standing, blockwise, ranks
from pretrain.kernels.ranks.reference import rounded_scores

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FORMS = ["blockwise", "triton"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (8, 8, 4), (63, 130, 33), (65, 64, 2048), (5, 200, 3)]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for item in tree_leaves(made):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel(), item.untyped_storage().nbytes() // item.element_size())
        return made


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that divide none of the shapes."""
    monkeypatch.setattr(blockwise, "CANDIDATE_BLOCK", 50)
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 3)


def exact(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """[count, width] small integers: every sum of their products is exact in fp32, so many scores are equal."""
    return torch.randint(-2, 3, (count, width)).to(DEVICE, dtype)


def pairs_of(relevant: Tensor) -> Relevance:
    query, candidate = relevant.nonzero().unbind(1)
    order = torch.randperm(len(query))
    return Relevance.of(query[order], candidate[order])


def some_relevance(queries: int, candidates: int) -> Relevance:
    """One to several answers for each query, by chance."""
    relevant = torch.rand(queries, candidates) < 0.05
    relevant[torch.arange(queries), torch.randint(candidates, (queries,))] = True
    found = pairs_of(relevant)
    return Relevance(found.query.to(DEVICE), found.candidate.to(DEVICE))


def same(found: Standing, wanted: Standing) -> None:
    for name in ("greater", "ties", "equals"):
        one, two = getattr(found, name), getattr(wanted, name)
        assert one.dtype == torch.int64
        assert one.tolist() == two.tolist(), name


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


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference_with_many_ties(shape: tuple[int, int, int], dtype: torch.dtype, form: str) -> None:
    if form == "triton" and (dtype == torch.float64 or (dtype == torch.bfloat16 and not CUDA)):
        pytest.skip("no such form")
    count, others, width = shape
    queries, candidates = exact(count, width, dtype), exact(others, width, dtype)
    relevance = some_relevance(count, others)
    wanted = ranks(queries, candidates, relevance, "reference")
    assert wanted.equals.min() >= 1
    assert others < 100 or wanted.ties.max() > 0
    same(ranks(queries, candidates, relevance, form), wanted)


@pytest.mark.parametrize("form", ["reference", "blockwise"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_recall_with_ties_is_the_mean_over_all_orders(form: str, k: int) -> None:
    queries = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    candidates = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    relevant = torch.tensor(
        [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]
    )
    found = ranks(queries, candidates, pairs_of(relevant), form).recall(k)
    torch.testing.assert_close(found, brute_force(queries @ candidates.T, relevant, k), rtol=0, atol=1e-12)


def test_expected_rank_with_ties() -> None:
    standing = Standing(torch.tensor([0, 2, 0]), torch.tensor([0, 1, 3]), torch.tensor([1, 1, 2]))
    assert standing.rank().tolist() == [1.0, 3.5, 2.0]


@pytest.mark.parametrize(("queries", "candidates"), [(1, 1), (300, 300), (257, 2500), (3, 5000)])
def test_one_to_one_equals_the_usual_formula(queries: int, candidates: int) -> None:
    """open_clip's get_clip_metrics: the place of the partner in the sorted row."""
    rows, columns = normalize(torch.randn(queries, 16), dim=1), normalize(torch.randn(candidates, 16), dim=1)
    partner = torch.randperm(candidates)[:queries]
    found = ranks(rows, columns, Relevance.of(torch.arange(queries), partner))
    ranking = torch.argsort(rows.double() @ columns.double().T, dim=1, descending=True)
    place = (ranking == partner[:, None]).nonzero()[:, 1]
    assert found.rank().tolist() == (place + 1.0).tolist()
    for k in (1, 5, 10):
        assert found.recall(k).tolist() == (place < k).double().tolist()


def test_several_relevant_candidates_equal_clip_benchmarks_formula() -> None:
    """A hit is a relevant candidate among the first k."""
    rows, columns, relevant = torch.randn(40, 8), torch.randn(200, 8), torch.rand(40, 200) < 0.02
    relevant[torch.arange(40), torch.arange(40)] = True
    found = ranks(rows, columns, pairs_of(relevant))
    for k in (1, 5, 10):
        top = (rows.double() @ columns.double().T).topk(k, dim=1).indices
        assert found.recall(k).tolist() == relevant.gather(1, top).any(1).double().tolist()


def test_without_relevance_candidate_i_answers_query_i() -> None:
    rows, columns = torch.randn(30, 8), torch.randn(70, 8)
    same(ranks(rows, columns), ranks(rows, columns, Relevance.of(torch.arange(30), torch.arange(30))))
    with pytest.raises(ValueError, match="70 queries have no partner each among 30 candidates"):
        ranks(columns, rows)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_a_collapsed_tower_gets_the_recall_of_guessing(form: str) -> None:
    collapsed = exact(1, 48, torch.float32).expand(150, -1)
    found = ranks(collapsed, collapsed, impl=form)
    assert found.greater.tolist() == [0] * 150
    assert math.isclose(found.recall(10).mean(), 10 / 150, rel_tol=1e-9)
    assert math.isclose(found.rank().mean(), 151 / 2, rel_tol=1e-9)


def test_equal_candidates_score_equal_wherever_they_stand() -> None:
    candidates = normalize(torch.randn(997, 61), dim=1)
    candidates[torch.tensor([3, 500, 996])] = candidates[0].clone()
    scores = rounded_scores(normalize(torch.randn(31, 61), dim=1), candidates)
    assert all(torch.equal(scores[:, n], scores[:, 0]) for n in (3, 500, 996))


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_undefined_scores_rank_below_all_but_must_not_be_the_answer(form: str) -> None:
    queries, candidates = exact(70, 8, torch.float32), exact(90, 8, torch.float32)
    candidates[80] = torch.nan
    with_nan = ranks(queries, candidates, impl=form)
    candidates[80] = candidates[80].new_zeros(8)
    queries_seen = torch.cat([queries, queries.new_ones(70, 1)], 1)
    lowest = torch.cat([candidates, candidates.new_zeros(90, 1)], 1)
    lowest[80, 8] = -1000
    same(with_nan, ranks(queries_seen, lowest, impl=form))
    candidates[3] = torch.nan
    with pytest.raises(ValueError, match="query 3 scores nan with its relevant candidate: not finite"):
        ranks(queries, candidates, impl=form)


def test_nothing_the_size_of_the_scores() -> None:
    rows, columns = normalize(torch.randn(3000, 8), dim=1), normalize(torch.randn(4000, 8), dim=1)
    with Largest() as seen:
        ranks(rows, columns)
    assert 0 < seen.elements <= blockwise.QUERY_BLOCK * blockwise.CANDIDATE_BLOCK
    assert seen.elements < 3000 * 4000 / 10
    with Largest() as seen:
        ranks(rows[:300], columns[:400], impl="triton")
    assert 0 < seen.elements < 300 * 400


def test_features_need_no_gradient() -> None:
    assert not ranks(torch.eye(3, requires_grad=True), torch.eye(3)).rank().requires_grad


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_no_queries(form: str) -> None:
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    queries, candidates = torch.zeros(0, 4, device=DEVICE), torch.eye(4, device=DEVICE)
    assert len(ranks(queries, candidates, Relevance.of(empty, empty), form).recall(1)) == 0
    assert len(ranks(queries, candidates[:0], impl=form).rank()) == 0


def relevance(query: list[int], candidate: list[int]) -> Relevance:
    return Relevance(torch.tensor(query), torch.tensor(candidate))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: ranks(torch.eye(2), torch.eye(2), relevance([0], [1])), "query 1 has no relevant candidate"),
        (lambda: ranks(torch.eye(2), torch.eye(2), relevance([0, 2], [0, 1])), "query 0 to 2, but there are 2"),
        (lambda: ranks(torch.eye(2), torch.eye(2), relevance([0, 1], [0, -1])), "candidate -1 to 0, but there are 2"),
        (lambda: ranks(torch.eye(2), torch.eye(2), relevance([1, 0], [0, 0])), "ascending order without repeats"),
        (lambda: ranks(torch.eye(2), torch.eye(2), relevance([0, 0, 1], [1, 1, 0])), "ascending order without"),
        (lambda: ranks(torch.eye(2), torch.eye(2), relevance([0, 1], [0])), r"\[1\], torch.int64.* must be two of"),
        (lambda: ranks(torch.eye(3), torch.eye(2)), r"queries \[3, 3\] and candidates \[2, 2\]"),
        (lambda: ranks(torch.zeros(2, 0), torch.zeros(2, 0)), r"\[2, 0\] and candidates \[2, 0\]"),
        (lambda: ranks(torch.eye(2), torch.eye(2).double()), "torch.float32 and candidates torch.float64"),
        (lambda: ranks(torch.eye(2), torch.eye(2, device="meta")), "queries on cpu and candidates on meta"),
        (lambda: ranks(torch.eye(2), torch.eye(2), impl="fast"), "impl 'fast' must be one of"),
        (lambda: ranks(torch.eye(2).double(), torch.eye(2).double(), impl="triton"), "no torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Standing], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("width", [1, 61, 512, 2048])
def test_on_a_gpu_copies_tie_with_the_answer_wherever_they_stand(width: int, dtype: torch.dtype) -> None:
    """Products that round: three copies of every answer, scattered, tie with it exactly."""
    queries = normalize(torch.randn(997, width), dim=1).to(DEVICE, dtype)
    unlike = normalize(torch.randn(997, width), dim=1).to(DEVICE, dtype)
    order = torch.randperm(4 * 997, device=DEVICE)
    candidates = unlike.repeat(4, 1)[order]
    place = order.argsort()[:997]
    found = ranks(queries, candidates, Relevance.of(torch.arange(997, device=DEVICE), place), "triton")
    assert found.ties.min() >= 3
    assert width < 61 or found.ties.eq(3).float().mean() > 0.95
    exact_rank = ranks(queries, candidates, Relevance.of(torch.arange(997, device=DEVICE), place), "reference").rank()
    assert (found.rank() - exact_rank).abs().max() <= (8 if width >= 61 else 997)
