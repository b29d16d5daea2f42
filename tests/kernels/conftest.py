"""For kernels: uninitialised memory is NaN, and tolerances are computed from an independent low-precision reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it then

Check = Callable[..., None]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads memory that nothing wrote gets NaN, not the zeros that a fresh page happens to hold."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make_filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

        return make_filled

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))


@pytest.fixture
def within_twice() -> Check:
    """`check(found, low, exact)`: error against fp64 at most twice the low-precision reference's, and one rounding.

    A sum whose terms cancel is rounded as its terms are: `terms` are these, in fp64.
    """

    def check(found: Tensor, low: Tensor, exact: Tensor, terms: Tensor | None = None) -> None:
        assert found.dtype == low.dtype
        assert found.shape == exact.shape
        size = exact.abs().max() if terms is None else terms.abs().sum()
        band = torch.finfo(found.dtype).eps * size
        allowed = 2 * ((low.double() - exact).abs().max() + band)
        if found.dtype == torch.float64:  # the reference is its own oracle here: what is left is the order of sums
            allowed = 1e-12 * (1 + exact.abs().max())
        assert (found.double() - exact).abs().max() <= allowed

    return check
