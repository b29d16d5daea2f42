"""GPUs by name: what their data sheets promise, what of it a training step gets, and what they cost.

Nothing here was measured by this project but the CPU. Peaks, memory and links are data sheets' (dense figures); shares
are assumptions: matrix products reach 0.64 of the bf16 peak (620 to 650 of 989 TFLOP/s are usual on an H100), attention
0.2 (short sequences, heads of 64), everything else 0.8 of the memory's rate. Prices are assumptions as well: about what
clouds ask for an hour on demand in 2025, in USD. `--price` and `--efficiency` replace them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pretrain.errors import UserError
from pretrain.plan.hardware import COLLECTIVE_S, H100, Link, Machine

GIB = 1 << 30
FORWARD_SHARE, BACKWARD_SHARE = 553 / 989, 600 / 989
"""Of the peak, in the loss's two sweeps: see `hardware.H100`."""


@dataclass(frozen=True)
class Gpu:
    """One kind of device and the cluster it usually comes in."""

    name: str
    memory_bytes: float
    """What a process sees of it."""
    bf16_flops: float
    fp32_flops: float
    memory_bytes_per_s: float
    machine: Machine
    """Its loss rates, and its links."""
    price: float
    """USD an hour, an assumption."""
    products: float = 0.64
    """Share of the peak that matrix products reach."""
    attention: float = 0.2
    """Share of the peak that attention reaches."""
    moving: float = 0.8
    """Share of the memory's rate that all other operators reach."""
    call_s: float = 6e-6
    """Seconds that the host takes to start an operator: where a pass is that small, they are what it waits for."""
    reserve_bytes: float = 3 * GIB
    """Context, libraries, communication buffers."""
    fragmented: float = 0.05
    """Share of what is in use that the allocator holds besides."""

    def peak(self, precision: str) -> float:
        """FLOP/s by the data sheet."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops

    @property
    def usable_bytes(self) -> float:
        """What tensors may take together."""
        return (self.memory_bytes - self.reserve_bytes) / (1 + self.fragmented)


def _machine(name: str, bf16: float, inside: float, card: float, several: float) -> Machine:
    """A cluster by its links in bytes/s: to a rank of the node, through one card, and per rank over all cards."""
    return Machine(
        name, FORWARD_SHARE * bf16, BACKWARD_SHARE * bf16,
        Link(inside, 15e-6), Link(card, 30e-6), Link(inside, COLLECTIVE_S), Link(several, COLLECTIVE_S), 8,
    )  # fmt: skip


def _gpu(
    name: str, gib: float, peaks: tuple[float, float], memory: float, machine: Machine, price: float, **more: float
) -> Gpu:
    return Gpu(name, gib * GIB, peaks[0] * 1e12, peaks[1] * 1e12, memory * 1e12, machine, price, **more)


_A100 = _machine("A100 nodes of 8, NVLink, one 200 Gb/s card a GPU", 312e12, 230e9, 22e9, 140e9)
_B200 = _machine("B200 nodes of 8, NVLink, one 400 Gb/s card a GPU", 2250e12, 650e9, 45e9, 300e9)
_PCIE = _machine("H100 PCIe nodes of 8, one 200 Gb/s card for two", 756e12, 40e9, 11e9, 11e9)
_L40S = _machine("L40S nodes of 8, PCIe 4, one 200 Gb/s card for four", 362e12, 20e9, 6e9, 6e9)
_4090 = _machine("RTX 4090 nodes of 8, PCIe 4, one 100 Gb/s card for all", 165e12, 12e9, 1.4e9, 1.4e9)

CPU = Gpu(
    name="cpu",
    memory_bytes=16 * GIB,
    bf16_flops=95e9,
    fp32_flops=95e9,
    memory_bytes_per_s=11.1e9,
    machine=_machine("one core of an AMD EPYC, ranks over gloo", 95e9, 1e9, 1e9, 1e9),
    price=0.05,
    products=0.84,
    attention=0.34,
    moving=1.0,
    call_s=0.0,
    reserve_bytes=0.5 * GIB,
)
"""One thread, in fp32: its rates are fitted to the two models of benchmarks/results/step_cpu.json; docs/plan.md has
their error for others. Price, links and memory are assumptions."""

GPUS = {
    one.name: one
    for one in (
        _gpu("h100", 79.1, (989, 67), 3.35, H100, 3.0),
        _gpu("h100-pcie", 79.1, (756, 51), 2.0, _PCIE, 2.4),
        _gpu("h200", 139.8, (989, 67), 4.8, H100, 3.8),
        _gpu("a100-40", 39.4, (312, 19.5), 1.555, _A100, 1.3),
        _gpu("a100-80", 79.1, (312, 19.5), 2.039, _A100, 1.8),
        _gpu("b200", 178.0, (2250, 80), 8.0, _B200, 5.5),
        _gpu("l40s", 44.4, (362, 91.6), 0.864, _L40S, 0.9),
        _gpu("rtx4090", 23.5, (165, 82.6), 1.008, _4090, 0.4),
        CPU,
    )
}
SHORT = {"a100": "a100-80"}


def find(name: str) -> Gpu:
    """By its name in the table; 'a100' is the one with 80 GB.

    Raises:
        UserError: there is no such GPU.
    """
    key = SHORT.get(name.lower(), name.lower())
    if key in GPUS:
        return GPUS[key]
    close = difflib.get_close_matches(key, GPUS, 2)
    near = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(GPUS)}"
    raise UserError(f"--gpu {name}: no such GPU is known; {near}")
