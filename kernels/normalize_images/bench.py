"""Time of the forms that run here: `python -m pretrain.kernels.normalize_images.bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pretrain.kernels import timing
from pretrain.kernels.dispatch import Impl, has_triton
from pretrain.kernels.normalize_images import normalize_images

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1024 if cuda else 64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    cases = {}
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            calls = forms(asked.batch, asked.size, device, dtype, memory_format)
            name = f"B={asked.batch} {asked.size} px, {dtype} {memory_format}".replace("torch.", "")
            cases[name] = timing.milliseconds(calls, asked.rounds, device)
    print(timing.table(cases))


def forms(
    batch: int, size: int, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> dict[str, Callable[[], Any]]:
    """Calls by name."""
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    names: list[Impl] = ["reference", "blockwise", "triton"]
    return {
        name: partial(normalize_images, images, MEAN, STD, dtype=dtype, memory_format=memory_format, impl=name)
        for name in (names if device.type == "cuda" and has_triton() else names[:2])
    }


if __name__ == "__main__":
    main()
