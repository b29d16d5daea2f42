"""Time and memory of the loss, forward and backward, against open_clip's on the same features: `make bench`.

Features are random unit vectors, d = 512; both sides get fp32 on the CPU and bf16 on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Result
from pretrain.compat import open_clip
from pretrain.losses import ClipLoss, SigLipLoss

CPU_SIZES, GPU_SIZES = (2048, 4096, 8192), (8192, 16384, 32768)
PAIRS: dict[str, tuple[type, type]] = {
    "clip": (open_clip.ClipLoss, ClipLoss),
    "siglip": (open_clip.loss.SigLipLoss, SigLipLoss),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=GPU_SIZES if torch.cuda.is_available() else CPU_SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results = [line for name in PAIRS for size in asked.sizes for line in compare(name, size, asked.rounds)]
    print(measure.table(results))
    print(measure.write("loss", results))


def compare(name: str, size: int, rounds: int, width: int = 512) -> list[Result]:
    """Seconds and peak extra bytes of both sides, and their ratios, at one batch size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theirs, ours = (partial(both_ways, loss(), *inputs(size, width, device, name)) for loss in PAIRS[name])
    seconds = measure.interleaved({"theirs": theirs, "ours": ours}, rounds, device)
    memory = {who: measure.extra_memory_bytes(call, device) for who, call in (("theirs", theirs), ("ours", ours))}
    case = f"{name} B={size} d={width}"
    result = partial(Result, "loss", case)
    return [
        result("open_clip", seconds["theirs"], "s"),
        result("ours", seconds["ours"], "s"),
        result("time ratio", seconds["ours"] / seconds["theirs"], "1"),
        result("open_clip extra memory", memory["theirs"] / 2**20, "MiB"),
        result("our extra memory", memory["ours"] / 2**20, "MiB"),
        result("memory ratio", memory["ours"] / memory["theirs"], "1"),
    ]


def inputs(size: int, width: int, device: torch.device, name: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [F.normalize(torch.randn(size, width, generator=generator), dim=-1) for _ in range(2)]
    features = [row.to(device, dtype).requires_grad_() for row in rows]
    scale = torch.tensor(14.3 if name == "clip" else 10.0, device=device, requires_grad=True)
    bias = (torch.tensor(-10.0, device=device, requires_grad=True),) if name == "siglip" else ()
    return (*features, scale, *bias)


def both_ways(loss: Callable[..., Tensor], *tensors: Tensor) -> None:
    loss(*tensors).backward()
    for tensor in tensors:
        tensor.grad = None


if __name__ == "__main__":
    main()
