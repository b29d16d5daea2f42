"""The learning rate by samples seen, so that another batch or world size keeps the curve; and its share for a group."""

from __future__ import annotations

import logging
import math

import torch

from pretrain.config import Optim
from pretrain.errors import UserError

log = logging.getLogger(__name__)


def learning_rate(optim: Optim, samples: int, total_samples: int, global_batch: int) -> float:
    """Learning rate of the step that takes samples [samples, samples + global_batch).

    Warm-up rises linearly and counts the step's own samples, so that the first step moves; everything behind it goes by
    the samples before the step. With warm-up in whole steps this is open_clip's rate at every step.

    Args:
        samples: pairs seen before the step.
        total_samples: length of the run.

    Raises:
        UserError: warm-up and decay are longer than the run.
    """
    warmup, decay = optim.warmup_samples, optim.decay_samples
    if warmup + decay > total_samples:
        raise UserError(
            f"optim.warmup_samples {warmup} + optim.decay_samples {decay} exceed the run's {total_samples} samples; "
            "shorten them or train longer"
        )
    factor = rate_factor(optim, global_batch)
    peak, end = optim.lr * factor, optim.lr_end * factor
    if samples < warmup:
        return peak * min(1.0, (samples + global_batch) / warmup)
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "rsqrt":
        return _rsqrt(samples, warmup, decay, total_samples, peak, end)
    length = decay if optim.schedule == "wsd" else total_samples - warmup
    done = min(1.0, max(0.0, 1 - (total_samples - samples) / length)) if length else 1.0
    left = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return end + left * (peak - end)


def rate_factor(optim: Optim, global_batch: int) -> float:
    """What optim.lr_scaling multiplies lr and lr_end with; 1.0 where it is not asked for.

    Source: linear, Goyal et al. 2017 (arXiv:1706.02677); the square root, for Adam, Malladi et al. 2022
    (arXiv:2205.10287).
    """
    if optim.lr_scaling is None:
        return 1.0
    rule, _, meant_for = optim.lr_scaling.partition("=")
    ratio = global_batch / int(meant_for)
    return ratio if rule == "linear" else math.sqrt(ratio)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of a step's learning rate: `lr_scale` of it, where `build` set one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def tell(optim: Optim, global_batch: int) -> None:
    """Say once what optim.lr_scaling makes of optim.lr, where it was asked for."""
    if optim.lr_scaling is not None:
        peak = optim.lr * rate_factor(optim, global_batch)
        log.info(
            "optim.lr %g becomes %g: optim.lr_scaling %s, train.global_batch %d",
            optim.lr, peak, optim.lr_scaling, global_batch,
        )  # fmt: skip


def _rsqrt(samples: int, warmup: int, decay: int, total_samples: int, peak: float, end: float) -> float:
    """peak * sqrt(warmup / samples), and a linear way to `end` over the last `decay` samples.

    Source: Zhai et al. 2022 (arXiv:2106.04560), section 3.5, with the warm-up as the time scale, which makes it
    continuous with it (Vaswani et al. 2017).
    """
    start = total_samples - decay
    if samples <= start:
        return peak * math.sqrt(warmup / samples)
    top = peak * math.sqrt(warmup / start)
    return end + (1 - (samples - start) / decay) * (top - end)
