"""Exponential moving average of the weights: updated each step, saved with them, evaluated in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain.engines.base import Engine
from pretrain.engines.shards import local, read_like, shape_of
from pretrain.engines.zero import ShardedAverage
from pretrain.errors import UserError


class Average:
    """average = decay * average + (1 - decay) * weights, of the trainable parameters, in at least fp32.

    Buffers (running statistics of norms) are copied, not averaged. Frozen parameters are their own average.

    Source: Polyak & Juditsky 1992; buffers as in timm's ModelEma.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the model's present weights.

        Args:
            decay: in (0, 1); 0.999 remembers about a thousand steps.
        """
        self.decay = decay
        self._swapped = False
        self._params = {name: _wide(param) for name, param in model.named_parameters() if param.requires_grad}
        self._buffers = {name: buffer.detach().clone() for name, buffer in _saved_buffers(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights in; call it after each optimizer step."""
        assert not self._swapped, "the model holds the average itself"
        params = dict(model.named_parameters())
        weights = [local(params[name].detach()).to(average.dtype) for name, average in self._params.items()]
        if weights:  # shard by shard where the weights are spread over ranks
            torch._foreach_lerp_([local(average) for average in self._params.values()], weights, 1 - self.decay)
        for name, buffer in _saved_buffers(model).items():
            self._buffers[name].copy_(buffer)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter and buffer name; the tensors themselves, spread over ranks as the weights are."""
        return self._held()

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, bit for bit.

        Raises:
            UserError: names or shapes are not those of this model.
        """
        own = self._held()
        if wrong := sorted(own.keys() ^ state.keys()):
            raise UserError(
                f"averaged weights do not fit the model: {wrong[0]} and {len(wrong) - 1} more; keep the config"
            )
        for name, value in own.items():
            if (shape := shape_of(state, name)) != value.shape:
                raise UserError(f"averaged weight {name}: shape {list(shape)}, model {list(value.shape)}")
            value.copy_(read_like(state, name, value))

    def _held(self) -> dict[str, Tensor]:
        return self._params | self._buffers

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """The model holds the average inside the block and its own weights, bit for bit, after it."""
        assert not self._swapped, "the model holds the average already"
        held = dict(model.named_parameters()) | _saved_buffers(model)
        kept = {name: held[name].detach().clone() for name in self._held()}
        self._swapped = True
        try:
            _copy(self._held(), held)
            yield
        finally:
            _copy(kept, held)
            self._swapped = False


def of(engine: Engine, model: nn.Module, decay: float | None) -> Average | ShardedAverage | None:
    """The average of an engine's weights; its own kind where no rank could look at them. None without a decay."""
    if decay is None:
        return None
    own: Callable[[float], ShardedAverage | None] | None = getattr(engine, "average", None)
    return (own(decay) if own else None) or Average(model, decay)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)


def _wide(param: Tensor) -> Tensor:
    return param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a checkpoint: not the constants a module rebuilds, such as an attention mask."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
