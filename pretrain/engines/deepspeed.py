"""DeepSpeed's ZeRO spreads optimizer state (stage 1), gradients too (2), weights too (3) over ranks; 0 spreads nothing.

The `deepspeed` command is not needed: ranks started by torchrun, srun or by hand are joined already when the engine is
made. Weights are fp32 and the towers run under autocast with bf16, as in every engine, so that a checkpoint carries
over; loss, scale and bias are outside of it.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain import config, optim
from pretrain.engines import deepspeed_config
from pretrain.engines.base import Judge
from pretrain.engines.single import warn_of_batch_norms
from pretrain.engines.zero import Places, ShardedAverage, on_main, saved_buffers
from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.values import Announce, Batch, Features, GradNorms
from pretrain.world import World

log = logging.getLogger(__name__)


class DeepSpeed:
    """See `base.Engine`."""

    def __init__(
        self, model: DualEncoder, options: config.Optim, world: World, parallel: config.Parallel | None = None
    ) -> None:
        parallel = parallel or config.Parallel()
        settings = deepspeed_config.merge(parallel, options, model.precision)
        self.stage: int = settings["zero_optimization"]["stage"]
        self.world, self.model = world, model
        _refuse_traced(model, self.stage)
        self.library = _library(world)
        warn_of_batch_norms(model)
        self.shapes = {name: param.shape for name, param in model.towers.named_parameters()}
        self.optimizer = optim.build(model.towers, options)
        self.wrapped = self._start(settings, parallel.deepspeed)
        self.places = self._places() if self.stage else None

    def average(self, decay: float) -> ShardedAverage | None:
        """The moving average of weights that no rank holds whole; None where `ema.Average` will do."""
        return ShardedAverage(self.places, self.model.towers, decay) if self.places and self.stage == 3 else None

    def forward(self, batch: Batch, announce: Announce | None = None) -> Features:
        return Features.of(self.wrapped(batch.images, batch.texts, announce, batch.for_towers))

    @contextmanager
    def averaging(self, on: bool) -> Iterator[None]:
        # Stages 2 and 3 average every part's gradients and add them up where they belong: the sum is the same.
        self.wrapped.set_gradient_accumulation_boundary(on)
        try:
            yield
        finally:
            self.wrapped.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss)

    def step(self, lr: float, clip_norm: float | None, judge: Judge | None = None) -> GradNorms:
        optim.set_rate(self.optimizer, lr)
        if self.places is None:
            norms = optim.grad_norms(self.model.towers, self.model.tower_of)
            keep = judge is None or bool(judge(norms))
            if clip_norm is not None:
                optim.clip(self.model.towers, norms, clip_norm)
        else:
            norms = self.places.grad_norms(self.model)
            keep = judge is None or bool(judge(norms))
            self.wrapped.optimizer.clip_grad = clip_norm or 0.0
        self._update(keep)
        self._clamp()
        return norms

    def _update(self, keep: bool) -> None:
        """Let DeepSpeed take its step, or clear the gradients alone."""
        if keep or self.places is None:
            with nullcontext() if keep else _without_update(self.optimizer):
                self.wrapped.step()
        else:
            self.places.break_gradients()  # there is no other way to tell ZeRO, whose step does more than the update
            self.wrapped.step()
        if keep and not self.wrapped.was_step_applied():
            log.warning("the gradient is not finite: DeepSpeed has left this step's update out")
        if not keep and self.places is not None and self.wrapped.was_step_applied():
            raise RuntimeError("DeepSpeed took a step whose gradients were not finite: use the version it is pinned to")
        if self.places is not None:
            self.places.forget_gradients()

    def model_state(self) -> dict[str, Tensor]:
        if self.places is None or self.stage < 3:
            return {name: tensor.detach() for name, tensor in self.model.towers.state_dict().items()}
        found = on_main(self._wholes(self.places), saved_buffers(self.model.towers))
        return {name: found[name] for name in self.model.towers.state_dict() if name in found}

    def optimizer_state(self) -> dict[str, Tensor]:
        if self.places is None:
            return optim.moments(self.optimizer, self.model.towers)
        return on_main(self.places.moments(self.optimizer), {})

    @torch.no_grad()
    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        towers = self.model.towers
        if self.stage < 3:
            towers.load_state_dict(model)
        else:
            _refuse_other_names(towers, model)
            for name, param in towers.named_parameters():
                with self.library.zero.GatheredParameters([param], modifier_rank=0):
                    if self.world.is_main:
                        param.copy_(model[name].reshape(param.shape))
            for name, buffer in saved_buffers(towers).items():
                buffer.copy_(model[name])
        if self.places is None:
            optim.load_moments(self.optimizer, towers, optimizer)
        else:
            self.places.load_weights(model)
            self.places.load_moments(self.optimizer, optimizer)

    def _start(self, settings: dict[str, Any], path: str | None) -> Any:
        # Deprecated names inside DeepSpeed, said at each call; nothing here can change them.
        warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
        try:
            with _scalars_sent([param for param in self.model.towers.parameters() if not param.ndim], self.stage):
                wrapped, *_ = self.library.initialize(
                    model=_Tensors(self.model), optimizer=self.optimizer, config=settings, dist_init_required=False
                )
        except (ValueError, AssertionError, TypeError, NotImplementedError) as error:
            if path is None:  # every setting is ours, and so is the mistake
                raise
            reason = " ".join(str(error).split())[:400]
            raise UserError(f"parallel.deepspeed {path}: DeepSpeed refuses the config: {reason}") from error
        return wrapped

    def _places(self) -> Places:
        return Places(self.wrapped.optimizer, self.stage, self.model.towers, self.shapes, self.world.device)

    def _wholes(self, places: Places) -> Iterator[tuple[str, Tensor]]:
        yield from places.weights()
        for name, param in self.model.towers.named_parameters():
            if not param.requires_grad:
                with self.library.zero.GatheredParameters([param]):
                    yield name, param.detach().reshape(self.shapes[name]).clone()

    @torch.no_grad()
    def _clamp(self) -> None:
        """The scale's ceiling, in the weights that the towers see and in the master weights behind them."""
        self.model.clamp()
        ceiling = math.log(self.model.max_logit_scale)
        if self.places is None or (place := self.places.named.get("logit_scale")) is None:
            return
        place.of(place.flat.data).clamp_(max=ceiling)
        if self.stage == 3:
            spread: Any = place.param
            spread.ds_tensor.clamp_(max=ceiling)


class _Tensors(nn.Module):
    """The encoder with its features as a plain dictionary: DeepSpeed's hooks do not look into other classes."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        # Not encoder(...): stage 3 gathers what a called module's outputs need, and must find tensors there.
        return self.encoder.forward(*inputs).tensors()


@contextmanager
def _without_update(optimizer: Any) -> Iterator[None]:
    """An optimizer whose step does nothing."""
    optimizer.step = lambda closure=None: None
    try:
        yield
    finally:
        del optimizer.step


@contextmanager
def _scalars_sent(scalars: list[Any], stage: int) -> Iterator[None]:
    """DeepSpeed 0.19 cannot send rank 0's tensors of no dimension (scale and bias): sent here, and marked as sent.

    Stage 3 sends them in another place: there they stay vectors of one number, which is what the towers take them for.
    """
    for param in scalars:
        dist.broadcast(param.data, src=0)
        param.ds_optim_param = True
        if stage == 3:
            param.data = param.data.reshape(1)
    try:
        yield
    finally:
        for param in scalars:
            del param.ds_optim_param


def _library(world: World) -> Any:
    """DeepSpeed, made ready for ranks that are joined already.

    Raises:
        UserError: it is not installed, or does not fit the machine.
    """
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise UserError(
            f"engine deepspeed: no module {error.name!r}; pip install 'pretrain[deepspeed]', or set engine fsdp2"
        ) from None
    if world.device.type == "cpu":
        # It would compile a collective through shared memory, for minutes, or wait for ever on another's lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        store: Any = dist.HashStore()  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    groups = deepspeed.utils.groups
    if groups._WORLD_GROUP is None:  # its own one would wait for half an hour, whatever train.timeout_s says
        groups._WORLD_GROUP = world.new_group()
    return deepspeed


def _refuse_traced(model: DualEncoder, stage: int) -> None:
    """Stage 3 gathers the weights of single layers from hooks inside of a block, unlike in each of its passes."""
    asked = {"model.speed compile": model.ways.compiled, "model.grad_checkpointing selective": model.ways.selective}
    for knob in [knob for knob, on in asked.items() if on and stage == 3]:
        raise UserError(
            f"{knob}: DeepSpeed's stage 3 gathers weights of single layers, in the midst of the blocks that it traces; "
            "leave it out, set parallel.zero_stage 2, or take engine fsdp2"
        )


def _refuse_other_names(towers: nn.Module, model: Mapping[str, Tensor]) -> None:
    """What load_state_dict refuses, without looking at shapes, which are empty at stage 3."""
    if wrong := sorted(towers.state_dict().keys() ^ model.keys()):
        raise UserError(f"weights do not fit the model: {wrong[0]} and {len(wrong) - 1} more; resume with its config")
