"""Checks of what each device computes: that a product is right, always the same, and the same on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from pretrain.doctor.base import Finding, Patient
from pretrain.kernels.dispatch import Form, choose
from pretrain.kernels.normalize_images import normalize_images
from pretrain.kernels.ranks import ranks
from pretrain.kernels.sigmoid_contrastive import sigmoid_contrastive
from pretrain.kernels.softmax_contrastive import softmax_contrastive
from pretrain.kernels.tiling import full_precision

SIDE, SIDE_CPU, TIMES, TIMED = 4096, 256, 3, 30
"""Rows of the matrices; products whose hashes are compared; products that are timed."""
SLOW = 0.7
"""Share of the ranks' median speed that a GPU must reach: the slowest sets the pace of all."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Of the largest entry."""


def matmul(patient: Patient) -> Iterator[Finding]:
    """A hash of products, and on a GPU their speed."""
    device = patient.world.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    # bf16 on a CPU goes other ways on other models; fp32 is what a CPU run computes in.
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        yield product(f"matmul {str(dtype).removeprefix('torch.')} on {kind}", dtype, device)
    if device.type == "cuda":
        mend = "look at clocks, cooling and power of the GPU, or leave the node out"
        needed = f"{SLOW:.0%} of the ranks' median"
        speed = _tflops(device)
        yield Finding(f"speed of {kind}", "bfloat16", "ok", needed, mend, amount=speed, unit="TFLOP/s", least=SLOW)


def product(name: str, dtype: torch.dtype, device: torch.device) -> Finding:
    """The same product several times: its hash, unless it differs from itself or is wrong."""
    side = SIDE if device.type == "cuda" else SIDE_CPU
    mend = "a device that computes differently is broken: leave its node out"
    made = torch.Generator().manual_seed(0)
    left, right = (torch.randn(side, side, generator=made).to(device, dtype) for _ in range(2))
    with _exact(device):
        found = [(left @ right).cpu() for _ in range(TIMES)]
    hashes = {xxhash.xxh3_64_hexdigest(each.view(torch.uint8).numpy().tobytes()) for each in found}
    error = _error(found[0][:64], left[:64].cpu().double() @ right.cpu().double())
    needed = f"one result, right to {TOLERANCE[dtype]:.0e}, on all ranks"
    if len(hashes) > 1 or not error < TOLERANCE[dtype]:
        return Finding(name, f"{len(hashes)} results of {TIMES}, error {error:.1e}", "fail", needed, mend)
    return Finding(name, f"hash {min(hashes)}", "ok", needed, mend, alike=min(hashes))


def kernels(patient: Patient) -> Iterator[Finding]:
    """Every kernel, in the form that runs here, against its reference: values and gradients."""
    device = patient.world.device
    asked = patient.config.loss.kernel if patient.config else "auto"
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    made = torch.Generator().manual_seed(1)
    rows, columns = (F.normalize(torch.randn(96, 64, generator=made)).to(device, dtype) for _ in range(2))
    pixels = torch.randint(0, 256, (4, 3, 24, 24), generator=made, dtype=torch.uint8).to(device)
    for name, run in _KERNELS.items():
        form = choose(name, asked, pixels.new_empty(0, dtype=torch.float32) if name == "normalize_images" else rows)
        given = (pixels,) if name == "normalize_images" else (rows, columns)
        pairs = zip(run(form, *given), run("reference", *given), strict=True)
        error = max(_error(found, right) for found, right in pairs)
        good = error < TOLERANCE[dtype]
        mend = "take loss.kernel blockwise, and look at the versions of torch, triton and the driver"
        yield Finding(f"kernel {name}", f"{form}, error {_rounded(error)}", "ok" if good else "fail",
                      f"the reference's results to {TOLERANCE[dtype]:.0e}", mend)  # fmt: skip


def _softmax(form: Form, rows: Tensor, columns: Tensor) -> list[Tensor]:
    def loss(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        return softmax_contrastive(rows, columns, scale, impl=form).sum()

    return _with_gradients(loss, rows, columns, rows.new_tensor(14.0, dtype=torch.float32))


def _sigmoid(form: Form, rows: Tensor, columns: Tensor) -> list[Tensor]:
    def loss(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_contrastive(rows, columns, scale, bias, impl=form)

    scale, bias = (rows.new_tensor(value, dtype=torch.float32) for value in (10.0, -10.0))
    return _with_gradients(loss, rows, columns, scale, bias)


def _ranks(form: Form, rows: Tensor, columns: Tensor) -> list[Tensor]:
    # Whole numbers: every form finds the same scores, and so the same counts.
    return [ranks((rows * 32).round(), (columns * 32).round(), impl=form).rank().float()]


def _normalize(form: Form, pixels: Tensor) -> list[Tensor]:
    return [normalize_images(pixels, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), impl=form)]


_KERNELS: dict[str, Callable[..., list[Tensor]]] = {
    "softmax_contrastive": _softmax,
    "sigmoid_contrastive": _sigmoid,
    "ranks": _ranks,
    "normalize_images": _normalize,
}


def _with_gradients(loss: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _error(found: Tensor, right: Tensor) -> float:
    """Largest difference, as a share of the largest right entry."""
    found, right = found.double(), right.double()
    return float((found - right).abs().max() / right.abs().max().clamp_min(1e-12))


def _rounded(error: float) -> str:
    """Its order of magnitude, so that ranks which differ by rounding say the same."""
    return "0" if error == 0 else f"below 1e{1 + int(f'{error:e}'.partition('e')[2]):+d}"


def _tflops(device: torch.device) -> float:
    matrix = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(TIMED):
        matrix @ matrix
    torch.cuda.synchronize(device)
    return TIMED * 2 * SIDE**3 / (time.perf_counter() - began) / 1e12


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """fp32 products in fp32, by one thread, so that ranks with unlike shares of cores sum alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with full_precision(device):
            yield
    finally:
        torch.set_num_threads(threads)
