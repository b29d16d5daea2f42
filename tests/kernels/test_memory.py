"""No tensor the size of the logits exists at any moment of forward or backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.kernels import tiling
from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive
from pretrain.kernels.softmax_contrastive import softmax_contrastive, softmax_maxima

B, D = 4096, 16


class Largest(TorchDispatchMode):
    """The most elements any operator's result had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.elements = max([self.elements, *sizes])
        return result


def softmax(rows, columns, scale, impl="auto"):
    sums = softmax_contrastive(rows, columns, scale, torch.zeros(()), None, 0, impl)
    (sums.row_sums.log().sum() + sums.column_sums.log().sum() - sums.positives.sum()).backward()


def tracked(rows, columns, scale):
    maxima = softmax_maxima(rows, columns, scale)
    softmax_contrastive(rows, columns, scale, *maxima).row_sums.sum().backward()


def sigmoid(rows, columns, scale):
    sigmoid_contrastive(rows, columns, scale, torch.tensor(-10.0)).backward()


def largest(loss, *args):
    rows, columns = (torch.randn(B, D, requires_grad=True) for _ in range(2))
    with Largest() as seen:
        loss(rows, columns, torch.tensor(1.0, requires_grad=True), *args)
    assert rows.grad is not None
    return seen.elements


@pytest.mark.parametrize("loss", [softmax, tracked, sigmoid])
def test_nothing_is_larger_than_a_tile(loss):
    assert largest(loss) <= tiling.CPU_TILE**2 < B * B / 8


def test_the_measure_sees_logits_where_there_are_some():
    assert largest(softmax, "reference") >= B * B
