"""One question to the plan: a config's work, spread over so many GPUs of a kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pretrain.config import Run
from pretrain.plan.communication import Case
from pretrain.plan.gpus import Gpu
from pretrain.plan.loss import Loss
from pretrain.plan.memory import Layout
from pretrain.plan.work import Work

Stage = Literal[0, 1, 2, 3]
"""What DeepSpeed spreads."""


@dataclass(frozen=True)
class Question:
    """What is to be predicted."""

    run: Run
    work: Work
    gpu: Gpu
    gpus: int
    node_size: int = 8
    efficiency: float | None = None
    """Share of the peak that the towers reach altogether, in place of the estimate."""

    @property
    def rows(self) -> int:
        """Pairs of a rank in a step."""
        return self.run.train.global_batch // self.gpus

    @property
    def micro(self) -> int:
        """Pairs of a pass."""
        return min(self.run.train.micro_batch or self.rows, self.rows)

    @property
    def parts(self) -> int:
        """Passes of a step; with several, the towers run forward twice."""
        return -(-self.rows // self.micro)

    @property
    def engine(self) -> str:
        named = self.run.engine
        return named if named != "auto" else "single" if self.gpus == 1 else "ddp"

    @property
    def layout(self) -> Layout:
        said = self.run.parallel
        return Layout(
            self.engine,
            self.gpus,
            said.replicas,
            said.reshard,
            2 if said.zero_stage is None else said.zero_stage,
            said.offload,
            2 if said.gather_dtype == "bf16" else 4,
            2 if said.reduce_dtype == "bf16" else 4,
        )

    @property
    def loss(self) -> Loss:
        """The cost model that fits the objectives: pairwise sigmoid, or softmax for all others."""
        return "siglip" if all("siglip" in one.name for one in self.run.objective) else "clip"

    @property
    def loss_bytes(self) -> int:
        """Bytes of a number that the loss multiplies and that travels."""
        said = self.run.loss.precision
        if said == "auto":
            return 2 if self.run.model.precision == "bf16" and self.gpu.name != "cpu" else 4
        return 4 if said == "fp32" else 2

    @property
    def columns(self) -> Case:
        """What the exchange carries."""
        sums = 2 if self.run.loss.accumulators == "bf16" else 4
        node = min(self.run.loss.node_size or self.node_size, self.gpus)
        slices = self.run.loss.slices
        return Case(self.gpus, self.rows, self.work.width, self.loss_bytes, sums, node, slices)

    def with_run(self, gpus: int | None = None, **train: int | None) -> Question:
        """The same with other GPUs, or another batch."""
        run = replace(self.run, train=replace(self.run.train, **train))  # type: ignore[arg-type]
        return replace(self, run=run, gpus=gpus or self.gpus)

    def under(self, engine: str, zero_stage: Stage | None = None) -> Question:
        """The same under another engine."""
        parallel = replace(self.run.parallel, zero_stage=zero_stage)
        return replace(self, run=replace(self.run, engine=engine, parallel=parallel))
