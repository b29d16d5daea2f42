"""Drop-in losses for trainers written for open_clip: its constructors and calls, exact gradients, little memory.

Under DistributedDataParallel, which averages gradients over ranks, W ranks give the loss (averaged over ranks) and
every gradient of one process on the whole batch, whatever the flags. The memory is that of the features, not of the
logits.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain import exchange
from pretrain.exchange import Exchange
from pretrain.objectives import ops
from pretrain.values import Features, Pairs

DIST_IMPLS = (None, "bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """As open_clip's `ClipLoss`: mean of the cross-entropies by image and by text."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        """Accept every argument of open_clip's.

        Args:
            local_loss: without effect, as the next: there is one way, which is exact.
            gather_with_grad: without effect.
            cache_labels: without effect: there are no labels to cache.
            rank: this process.
            world_size: number of processes; above 1 torch.distributed must be initialised when the loss is called.
            use_horovod: must be False.

        Raises:
            ValueError: use_horovod is set.
        """
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod True is not supported: start the ranks with torchrun and leave it out")
        if world_size > 1 and (local_loss or gather_with_grad):
            _notice("local_loss and gather_with_grad have no effect")
        _warn_alone(world_size)
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Mean loss of this rank's rows.

        Args:
            image_features: [B, D]; B may differ between ranks. Any floating dtype, computed as `pretrain.kernels` says.
            text_features: [B, D].
            logit_scale: factor of the cosines, [] or [1] or a number.
            logit_bias: cancels out of a softmax; its gradient is zero.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            [] fp32 (fp64 for fp64 features) nats.

        Raises:
            ValueError: on every rank, before anything large is sent: shapes, dtypes, devices or the scale do not fit,
                or no rank has rows.

        Source: Radford et al. 2021, fig. 3 (arXiv:2103.00020).
        """
        way = _exchange(self.rank, self.world_size, image_features)
        pairs = _pairs(image_features, text_features, logit_scale, None, way)
        loss = pairs.mean(ops.symmetric_cross_entropy(pairs))
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # DistributedDataParallel waits for the gradient of every parameter
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """As open_clip's `SigLipLoss`: binary cross-entropy of every pair, summed over texts, mean over images."""

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        """Accept every argument of open_clip's.

        Args:
            cache_labels: without effect: there are no labels to cache.
            rank: this process.
            world_size: number of processes; above 1 torch.distributed must be initialised when the loss is called.
            dist_impl: without effect: texts are gathered once.

        Raises:
            ValueError: dist_impl is none of open_clip's.
        """
        super().__init__()
        if dist_impl not in DIST_IMPLS:
            raise ValueError(f"dist_impl {dist_impl!r} must be one of {', '.join(map(str, DIST_IMPLS))}")
        if world_size > 1 and dist_impl not in (None, "gather"):
            _notice(f"dist_impl {dist_impl} has no effect: texts are gathered once")
        _warn_alone(world_size)
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of this rank's rows against all texts, divided by this rank's rows.

        Args:
            image_features: [B, D]; B may differ between ranks. Any floating dtype, computed as `pretrain.kernels` says.
            text_features: [B, D].
            logit_scale: factor of the cosines, [] or [1] or a number.
            logit_bias: added to every logit, [] or [1] or a number; None: 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            [] fp32 (fp64 for fp64 features) nats.

        Raises:
            ValueError: on every rank, before anything large is sent: shapes, dtypes, devices or the scale do not fit,
                or no rank has rows.

        Source: Zhai et al. 2023, eq. 1 (arXiv:2303.15343).
        """
        way = _exchange(self.rank, self.world_size, image_features)
        loss = ops.pairwise_sigmoid(_pairs(image_features, text_features, logit_scale, logit_bias, way))
        return {"contrastive_loss": loss} if output_dict else loss


def _warn_alone(world_size: int) -> None:
    """As in open_clip, one rank is the default; several that run each keep to their own negatives then."""
    running = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size == 1 < running:
        warnings.warn(
            f"world_size 1, but {running} ranks are running: each keeps to its own negatives; pass rank and world_size",
            stacklevel=3,
        )


def _exchange(rank: int, world_size: int, features: Tensor) -> Exchange:
    """Every batch is checked. Under a GPU's autocast products are fp16: unit vectors fit, more exactly than in bf16."""
    fast = features.is_cuda and torch.is_autocast_enabled("cuda") and features.dtype == torch.float32
    options = exchange.Options(products=torch.float16 if fast else None, checks=math.inf)
    return exchange.make("auto", rank, world_size, options)


def _pairs(
    image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None, exchange: Exchange
) -> Pairs:
    bias = None if bias is None else _scalar(bias, image)
    return Pairs(Features(image, text, _scalar(scale, image), bias), exchange)


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """[] of a number, or of a parameter that FSDP made [1]."""
    if isinstance(value, Tensor):
        return value.reshape(())
    return torch.tensor(float(value), device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else None)


def _notice(text: str) -> None:
    warnings.warn(f"{text}; gradients are those of one process on the whole batch in any setting", stacklevel=3)
