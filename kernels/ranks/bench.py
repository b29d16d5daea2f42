"""Time of the forms that run here, against a sort of the whole matrix: `python -m pretrain.kernels.ranks.bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pretrain.kernels import timing
from pretrain.kernels.dispatch import Impl, has_triton
from pretrain.kernels.ranks import ranks

CPU_SIZES, GPU_SIZES = (1000, 4000), (5000, 25000)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=GPU_SIZES if cuda else CPU_SIZES)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    cases = {
        f"Q=M={size} D={asked.width} fp32": timing.milliseconds(forms(size, asked.width, device), asked.rounds, device)
        for size in asked.sizes
    }
    print(timing.table(cases))


def forms(size: int, width: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Calls by name."""
    generator = torch.Generator().manual_seed(size)
    queries, candidates = (normalize(torch.randn(size, width, generator=generator), dim=1).to(device) for _ in range(2))
    found: dict[str, Callable[[], Any]] = {"argsort": partial(by_sorting, queries, candidates)}
    here: list[Impl] = ["reference", "blockwise", "triton"]
    for form in here if device.type == "cuda" and has_triton() else here[:2]:
        found[form] = partial(ranks, queries, candidates, None, form)
    return found


def by_sorting(queries: Tensor, candidates: Tensor) -> Tensor:
    """[Q] the place of each partner in its sorted row: the usual way, ties as the sort leaves them."""
    order = torch.argsort(queries @ candidates.T, dim=1, descending=True)
    return (order == torch.arange(len(queries), device=queries.device)[:, None]).nonzero()[:, 1]


if __name__ == "__main__":
    main()
