"""Whatever precision surrounds a kernel, inside it is fp32; and what was set before is set again after."""

import pytest
import torch

from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive
from pretrain.kernels.softmax_contrastive import softmax_contrastive
from pretrain.kernels.tiling import full_precision


def softmax(rows, columns, scale, impl):
    return softmax_contrastive(rows, columns, scale, impl=impl).sum()


def sigmoid(rows, columns, scale, impl):
    return sigmoid_contrastive(rows, columns, scale, torch.tensor(-5.0), impl=impl)


@pytest.fixture
def low_matmuls():
    """The settings a user may have made for speed."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = "tf32", "bf16"
    yield lambda: tuple(backend.fp32_precision for backend in backends)
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("loss", [softmax, sigmoid])
def test_autocast_and_fast_matmuls_change_nothing(loss, impl, low_matmuls):
    def run():
        torch.manual_seed(1)
        leaves = [x.requires_grad_() for x in (torch.randn(64, 16), torch.randn(64, 16), torch.tensor(3.0))]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            total = loss(*leaves, impl)
        if impl == "auto":
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                total.backward()
        else:  # autograd's own backward knows no fp32 but the one that is set around it
            with full_precision(torch.device("cpu")):
                total.backward()
        return [total.detach(), *(x.grad for x in leaves)]

    low = True
    found = run()
    low = False
    with full_precision(torch.device("cpu")):
        wanted = run()
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


def test_settings_return_after_an_error(low_matmuls):
    inside = []

    def fail():
        with full_precision(torch.device("cpu")):
            inside.append(low_matmuls())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [("ieee", "ieee")]
    assert low_matmuls() == ("tf32", "bf16")
