"""What each exchange costs one rank in one optimizer step, in closed form: bytes, memory, predicted seconds.

W ranks hold b rows each, B = W b in all, of d numbers. Columns travel in `bytes_each` bytes a number, their gradients
in `gradient_bytes`. Seconds are for the softmax loss, whose backward sweep needs the columns a second time.

    compute    2 b B d / F_forward + 6 b B d / F_backward
    local      compute
    gather     compute + all-reduce of the B column sums; exposed: + all-gather + reduce-scatter
    streamed   the same in K slices, each slice's messages beside the slice before it
    ring       W times the slower of one block's compute and one hop, forward and backward, + the last hop home
    hierarchical   as ring between nodes, where each rank's own card carries its own block

A ring's hop is hidden behind a block's compute where 2 b b d / F >= 2 b d / (bytes per second): d cancels, and
b >= F / (bytes per second) decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.plan.hardware import Link, Machine
from pretrain.plan.loss import Loss, forward_flops

STATISTIC_BYTES = 4


@dataclass(frozen=True)
class Case:
    """A global batch and how it lies on its ranks."""

    ranks: int
    """W"""
    rows: int
    """b, of one rank."""
    width: int
    """d"""
    bytes_each: int = 2
    gradient_bytes: int = 4
    node_size: int = 8
    slices: int = 4
    """K, of `streamed`."""

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.node_size)

    @property
    def block(self) -> int:
        """Bytes of one rank's columns."""
        return self.rows * self.width * self.bytes_each

    @property
    def gradient_block(self) -> int:
        """Bytes of the gradient of one rank's columns."""
        return self.rows * self.width * self.gradient_bytes


def memory_bytes(name: str, case: Case) -> int:
    """Of travelling columns and their gradients, buffers that are filled while others are in use included."""
    both = case.block + case.gradient_block
    return {
        "local": 0,
        "gather": case.ranks * both,
        "streamed": 2 * case.ranks * both // case.slices,
        "ring": 2 * both,
        "bidirectional": 4 * both,
        "hierarchical": 2 * case.node_size * both,
    }[name]


def bytes_sent(name: str, case: Case, loss: Loss = "clip") -> int:
    """That leave a rank in one step; a collective counts as its ring algorithm.

    Columns reach every other rank once forward, and with softmax again backward unless they were kept; gradients come
    back once. Besides, softmax's column sums of all rows are added up over ranks, and each rank's part of their
    gradient is told to all. `hierarchical` sends (M - 1) / (W - 1) of columns and gradients across its M nodes.
    """
    if case.ranks == 1:
        return 0
    if loss == "siglip":
        return (case.ranks - 1) * (case.block + case.gradient_block)
    others, sweeps = case.ranks - 1, 1 if name == "gather" else 2
    sums = 2 * others * (case.ranks * case.rows + 1) * STATISTIC_BYTES // case.ranks
    return others * (sweeps * case.block + case.gradient_block + case.rows * STATISTIC_BYTES) + sums


def break_even_rows(flops_per_s: float, link: Link, multiplied: int = 2, sent: int = 2) -> float:
    """Rows b from which a ring's hop is hidden behind a block's compute, latency aside: independent of the width.

    Args:
        flops_per_s: of the sweep.
        link: one hop.
        multiplied: FLOP per logit and feature: 2 forward, 6 backward.
        sent: bytes per feature of a hop: 2 forward in 16 bits, 6 backward with an fp32 gradient.
    """
    return sent * flops_per_s / (multiplied * link.bytes_per_s)


def compute_s(case: Case, machine: Machine) -> tuple[float, float]:
    """Forward and backward seconds of a rank's b x B logits."""
    one_pass = forward_flops(case.rows, case.ranks * case.rows, case.width)
    return one_pass / machine.forward_flops, 3 * one_pass / machine.backward_flops


def seconds(name: str, case: Case, machine: Machine, *, hidden: bool = True) -> float:
    """Predicted seconds of the loss, forward and backward.

    Args:
        hidden: gather's messages travel behind the towers, and only the column sums' all-reduce shows.
    """
    if case.ranks == 1:
        return sum(compute_s(case, machine))
    if name == "gather":
        return _gather(case, machine, hidden)
    models: dict[str, Callable[[Case, Machine], float]] = {
        "streamed": _streamed,
        "ring": _ring,
        "bidirectional": _bidirectional,
        "hierarchical": _hierarchical,
    }
    return models[name](case, machine)


def _gather(case: Case, machine: Machine, hidden: bool) -> float:
    link, others = machine.collective(case.ranks, case.node_size), case.ranks - 1
    shown = 0.0 if hidden else link.seconds(others * case.block) + link.seconds(others * case.gradient_block)
    return sum(compute_s(case, machine)) + shown + _column_sums(case, machine)


def _streamed(case: Case, machine: Machine) -> float:
    """The first slice's columns and the last slice's gradient have nothing to hide behind."""
    link, others = machine.collective(case.ranks, case.node_size), case.ranks - 1
    columns = link.seconds(others * case.block / case.slices)
    gradient = link.seconds(others * case.gradient_block / case.slices)
    forward, backward = (time / case.slices for time in compute_s(case, machine))
    more = case.slices - 1
    there = columns + more * max(forward, columns) + forward
    back = columns + more * max(backward, columns + gradient) + backward + gradient
    return there + back + _column_sums(case, machine)


def _ring(case: Case, machine: Machine) -> float:
    return _hops(case, machine, machine.message(case.ranks, case.node_size), steps=case.ranks, blocks=1)


def _bidirectional(case: Case, machine: Machine) -> float:
    """Half the hops, each with two blocks: a rank's own link carries as many bytes, and only latency is saved."""
    link = machine.message(case.ranks, case.node_size)
    return _hops(case, machine, link, steps=-(-case.ranks // 2), blocks=2)


def _hierarchical(case: Case, machine: Machine) -> float:
    """A hop between nodes serves a node's whole share of the compute; what follows inside the node is not counted."""
    return _hops(case, machine, machine.across, steps=case.nodes, blocks=1)


def _hops(case: Case, machine: Machine, link: Link, steps: int, blocks: int) -> float:
    """`steps` times the slower of compute and a hop with `blocks` blocks, both sweeps, and the gradient's way home."""
    forward, backward = (time / steps for time in compute_s(case, machine))
    there = max(forward, link.seconds(blocks * case.block))
    back = max(backward, link.seconds(blocks * (case.block + case.gradient_block)))
    home = blocks * case.gradient_block / link.bytes_per_s
    return steps * (there + back) + home + _column_sums(case, machine)


def _column_sums(case: Case, machine: Machine) -> float:
    size = 2 * STATISTIC_BYTES * case.ranks * case.rows
    return machine.collective(case.ranks, case.node_size).seconds(size)
