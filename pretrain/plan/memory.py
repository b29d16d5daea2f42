"""What each engine keeps on a rank and sends from it, in closed form. Activations, features and the loss are not here.

T numbers, W ranks, S = W / replicas ranks that share a model. Weights, gradients and moments are fp32 whatever the
towers compute in (autocast): 4 bytes each.

    single, ddp   weights 4 T, gradients 4 T, moments m T
    fsdp2         1 / S of each, and the two largest parts whole while they compute; all of the model without reshard
    deepspeed 0   as ddp
    deepspeed 1, 2   weights 4 T; 1 / W of master weights, gradients and moments
    deepspeed 3   1 / W of weights, master weights, gradients and moments; small tensors stay whole

A ring moves (n - 1) / n of a collective's bytes over n ranks, an all-reduce twice that.
Sources: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054); DeepSpeed 0.19's defaults for its buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import UserError
from pretrain.plan.towers import Sizes

NUMBER = 4
"""Bytes of an fp32 number."""
BUCKET, LIVE, SMALL = 500_000_000, 1_000_000_000, 100_000
"""DeepSpeed's reduce_bucket_size, stage3_max_live_parameters and stage3_param_persistence_threshold, in numbers."""
MOMENTS = {"adamw": 8, "stable_adamw": 8, "lion": 4, "lamb": 8}
"""Bytes a number."""
MUON = {"matrix": 4, "other": 8}
EIGHT_BIT = {"large": 2 + 8 / 256, "small": 8, "from": 4096}
"""Two bytes and two fp32 scales for every 256 numbers, in tensors from 4096 numbers on."""


@dataclass(frozen=True)
class Layout:
    """An engine and its options; names are those of the config's `engine` and `parallel`."""

    engine: str
    ranks: int = 1
    replicas: int = 1
    reshard: bool = True
    zero_stage: int = 2
    offload: bool = False
    gather_bytes: int = 4
    """Of a gathered weight: 2 with gather_dtype bf16."""
    reduce_bytes: int = 4
    """Of a gradient that is sent: 2 with reduce_dtype bf16."""

    @property
    def sharers(self) -> int:
        """S: ranks that share a model."""
        return self.ranks // self.replicas

    @property
    def stage(self) -> int:
        """What is spread, in ZeRO's numbers: 0 nothing, 1 moments, 2 gradients too, 3 weights too."""
        if self.engine == "deepspeed":
            return self.zero_stage
        return 3 if self.engine == "fsdp2" else 0


@dataclass(frozen=True)
class Held:
    """Bytes on one rank, when a backward pass has ended and the update is to come."""

    weights: int
    masters: int
    """A second copy of the weights, which DeepSpeed updates."""
    gradients: int
    moments: int
    average: int
    """The moving average of the weights (`optim.ema_decay`), 0 without."""
    at_work: int
    """Gathered weights and buffers, at their peak; always on the device."""
    host: int
    """How much of weights, masters, gradients, moments and average is in CPU memory."""

    @property
    def kept(self) -> int:
        """All but what is only there at work."""
        return self.weights + self.masters + self.gradients + self.moments + self.average

    @property
    def device(self) -> int:
        """On the GPU at most, beside activations."""
        return self.kept - self.host + self.at_work


def held(model: Sizes, layout: Layout, optimizer: str = "adamw", average: bool = False, parts: int = 1) -> Held:
    """Memory of one rank.

    Args:
        optimizer: `optim.name`.
        average: whether there is a moving average.
        parts: passes of a step (a rank's rows by train.micro_batch). With several, fsdp2 keeps whole gradients.

    Raises:
        UserError: there is no such engine or optimizer.
    """
    _check(layout)
    share, whole = _share(layout), NUMBER * model.total
    masters = whole // share if layout.engine == "deepspeed" and layout.stage else 0
    part = whole // share if layout.stage == 3 else whole
    weights = part + (NUMBER * model.under(SMALL + 1) if layout.engine == "deepspeed" and layout.stage == 3 else 0)
    late = parts > 1 and layout.engine == "fsdp2"
    gradients = whole // share if layout.stage and not late else whole
    moments, averaged = int(moment_bytes(model, optimizer) / share), part if average else 0
    away = masters + gradients + moments if layout.offload and layout.stage else 0
    away += part + averaged if layout.offload and layout.stage == 3 else 0
    return Held(weights, masters, gradients, moments, averaged, _at_work(model, layout), away)


def moment_bytes(model: Sizes, optimizer: str) -> float:
    """Of the whole model.

    Raises:
        UserError: there is no such optimizer.
    """
    if optimizer in MOMENTS:
        return MOMENTS[optimizer] * model.total
    if optimizer == "muon":
        return MUON["other"] * model.total - (MUON["other"] - MUON["matrix"]) * model.matrices
    if optimizer == "adamw8bit":
        small = model.under(int(EIGHT_BIT["from"]))
        return EIGHT_BIT["large"] * (model.total - small) + EIGHT_BIT["small"] * small
    raise UserError(f"optim.name {optimizer}: no such optimizer; one of {', '.join([*MOMENTS, 'muon', 'adamw8bit'])}")


def bytes_sent(model: Sizes, layout: Layout, parts: int = 1) -> int:
    """That leave a rank in one step for weights and gradients; the loss's exchange comes on top.

    Weights are gathered once for each forward and, unless they were kept, once for each backward pass. A step of
    several parts runs the towers forward twice. Gradients are reduced once, at ZeRO's stages 2 and 3 once a part.
    """
    _check(layout)
    gathers = parts * (1 + (parts > 1) + (layout.reshard or layout.engine == "deepspeed"))
    gradients, weights = layout.reduce_bytes * model.total, layout.gather_bytes * model.total
    near = (layout.sharers - 1) / layout.sharers
    if layout.stage == 0:
        return int(2 * (layout.ranks - 1) / layout.ranks * gradients)
    reduces = parts if layout.engine == "deepspeed" and layout.stage > 1 else 1
    if layout.stage < 3:  # updated weights are told to all
        return int(near * (reduces * gradients + weights))
    between = 2 * (layout.replicas - 1) / layout.replicas * gradients / layout.sharers
    return int(near * (gathers * weights + reduces * gradients) + between)


def _at_work(model: Sizes, layout: Layout) -> int:
    if layout.engine == "fsdp2":
        return layout.gather_bytes * (model.largest_units if layout.reshard else model.total)
    if layout.engine == "deepspeed" and layout.stage:
        gathered = min(LIVE, model.total) if layout.stage == 3 else 0
        return NUMBER * (BUCKET + gathered)
    return 0


def _share(layout: Layout) -> int:
    return layout.sharers if layout.stage else 1


def _check(layout: Layout) -> None:
    if layout.engine not in ("single", "ddp", "fsdp2", "deepspeed"):
        raise UserError(f"engine {layout.engine}: no such engine; one of single, ddp, fsdp2, deepspeed")
    if layout.ranks % layout.replicas:
        raise UserError(f"parallel.replicas {layout.replicas} does not divide {layout.ranks} ranks")
