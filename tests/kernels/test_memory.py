"""No tensor the size of the logits exists at any moment of forward or backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.kernels import tiling
from pretrain.kernels.columns import Here
from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive_over
from pretrain.kernels.softmax_contrastive import softmax_contrastive_over
from pretrain.kernels.softmax_contrastive.loss import Sweep

B, D = 4096, 16


class Largest(TorchDispatchMode):
    """The most elements any operator's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.elements = max([self.elements, *sizes])
        return result


def softmax(rows, columns, scale, **options):
    softmax_contrastive_over(rows, columns, scale, Here(columns, B), **options).sum().backward()


def tracked(rows, columns, scale, **options):
    """At this scale rows get shifts of their own."""
    calls, own = [], Sweep._tracked_sums
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "_tracked_sums", lambda sweep: calls.append(1) or own(sweep))
        softmax(rows, columns, 1000 * scale, **options)
    assert calls


def sigmoid(rows, columns, scale, **options):
    sigmoid_contrastive_over(rows, columns, scale, torch.tensor(-10.0), Here(columns, B), **options).backward()


def largest(loss, **options):
    rows, columns = (torch.randn(B, D, requires_grad=True) for _ in range(2))
    with Largest() as seen:
        loss(rows, columns, torch.tensor(1.0, requires_grad=True), **options)
    assert rows.grad is not None
    assert columns.grad is not None
    return seen.elements


@pytest.mark.parametrize("duplicates", ["negatives", "ignore", "positives"])
@pytest.mark.parametrize("loss", [softmax, tracked, sigmoid])
def test_nothing_is_larger_than_a_tile(loss, duplicates):
    ids = torch.arange(B) // 2
    assert largest(loss, duplicates=duplicates, row_ids=ids, column_ids=ids) <= tiling.CPU_TILE**2 < B * B / 8


@pytest.mark.parametrize("loss", [softmax, sigmoid])
def test_the_measure_sees_logits_where_there_are_some(loss):
    assert largest(loss, impl="reference") >= B * B
