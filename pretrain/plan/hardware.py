"""Machines as a cost model sees them: how fast ranks compute a loss, and how fast they reach each other."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Link:
    """A way from one rank to others."""

    bytes_per_s: float
    """What a rank sends on it, and at the same time receives."""
    latency_s: float
    """From asking to the first byte."""

    def seconds(self, size: float) -> float:
        """Of one message."""
        return self.latency_s + size / self.bytes_per_s


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes."""

    name: str
    forward_flops: float
    """FLOP/s of a rank in the loss's forward sweep, which takes exponentials between its matrix products."""
    backward_flops: float
    """FLOP/s of a rank in its backward sweep, most of which is library matrix products."""
    inside: Link
    """Message to a rank of the same node."""
    across: Link
    """Message to a rank of another node: it passes one network card."""
    collective_inside: Link
    """Collective within a node, per rank."""
    collective_across: Link
    """Collective over several nodes, per rank: it uses every network card of a node."""
    node_size: int
    """Ranks of a node."""

    def message(self, ranks: int, node_size: int) -> Link:
        """The slowest hop of a ring of so many ranks."""
        return self.inside if ranks <= node_size else self.across

    def collective(self, ranks: int, node_size: int) -> Link:
        return self.collective_inside if ranks <= node_size else self.collective_across


COLLECTIVE_S = 40e-6

H100 = Machine(
    name="H100 nodes of 8, NVLink, one 400 Gb/s card a GPU",
    forward_flops=553e12,
    backward_flops=600e12,
    inside=Link(370e9, 15e-6),
    across=Link(45e9, 30e-6),
    collective_inside=Link(370e9, COLLECTIVE_S),
    collective_across=Link(250e9, COLLECTIVE_S),
    node_size=8,
)
"""Assumptions, none of them measured by this project.

- forward 553 and backward 600 TFLOP/s: 70 % and 76 % of the 790 TFLOP/s that a large bf16 product reaches; what the
  kernels aim at.
- inside 370 GB/s: NCCL's effective NVLink rate (NVIDIA/nccl-tests #212; 380 GB/s point to point in NVIDIA/nccl #1264).
- across 45 GB/s: one NDR card, 50 GB/s less protocol.
- collectives over nodes 250 GB/s per GPU: NVIDIA/nccl #1218 reports 200 to 340 on 256 H100.
- latencies 15 us within a node, 30 us between nodes, 40 us for a collective: usual orders of magnitude.
"""


def with_links(machine: Machine, factor: float, name: str) -> Machine:
    """The same where every link carries `factor` times as much."""

    def scaled(link: Link) -> Link:
        return replace(link, bytes_per_s=link.bytes_per_s * factor)

    return replace(
        machine,
        name=f"{machine.name}, {name}",
        inside=scaled(machine.inside),
        across=scaled(machine.across),
        collective_inside=scaled(machine.collective_inside),
        collective_across=scaled(machine.collective_across),
    )


PRESETS = {
    "nominal": H100,
    "slow": with_links(H100, 0.7, "links 30 % slower"),
    "fast": with_links(H100, 1.2, "links 20 % faster"),
}
"""The band in which a prediction is to be read: links differ more between clusters than anything else."""

CPU = Machine(
    name="CPU ranks over gloo",
    forward_flops=5e10,
    backward_flops=5e10,
    inside=Link(1e9, 2e-4),
    across=Link(1e9, 5e-4),
    collective_inside=Link(1e9, 5e-4),
    collective_across=Link(1e9, 1e-3),
    node_size=8,
)
"""Orders of magnitude without a source: here so that a choice can be made where there is no GPU, as in tests."""

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s that a GPU's data sheet promises, by a part of its name; the first part that fits counts."""


def peak_flops(device_name: str) -> float | None:
    """What the data sheet promises of a device, by the name its driver tells; None where the table has no such one."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
