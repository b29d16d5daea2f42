"""Where the learned scale and bias start, and how high the scale may rise."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pretrain import config
from pretrain.errors import UserError
from pretrain.towers import weights

log = logging.getLogger("pretrain")


@runtime_checkable
class Wanted(Protocol):
    """What an objective says of the head; see objectives/base.py."""

    init_logit_scale: float
    init_logit_bias: float | None
    max_logit_scale: float


@dataclass(frozen=True)
class Head:
    """Scale and bias at the start of a run."""

    log_scale: float
    """ln of the factor that cosines are multiplied by: what the parameter holds."""
    bias: float | None
    """None where no objective has a bias."""
    max_log_scale: float
    """Ceiling of the parameter; inf for none."""


def choose(model: config.Model, objectives: Sequence[Wanted], loaded: weights.Head | None) -> Head:
    """Start of scale and bias: the config's, else what was loaded where it fits the objective, else the objective's.

    A checkpoint without a bias does not fit an objective with one: its scale was learned by a softmax. The first
    objective that has a bias speaks for all of them, or else the first; the lowest ceiling counts.

    Raises:
        UserError: a bias is asked for that no objective uses, or a start above its own ceiling.
    """
    main = next((item for item in objectives if item.init_logit_bias is not None), objectives[0])
    if model.logit_bias is not None and main.init_logit_bias is None:
        raise UserError(f"model.logit_bias {model.logit_bias}: objective {_name(main)} has no bias; remove it")
    fits = loaded if loaded and _fits(loaded, main) else None
    bias = main.init_logit_bias
    if bias is not None and fits and fits.bias is not None:
        bias = fits.bias
    if model.logit_bias is not None:
        bias = model.logit_bias
    log_scale = _log_scale(model, main, fits)
    _tell(model, main, loaded)
    return _under_ceiling(model, objectives, Head(log_scale, bias, math.inf))


def _fits(loaded: weights.Head, main: Wanted) -> bool:
    return main.init_logit_bias is None or loaded.bias is not None


def _log_scale(model: config.Model, main: Wanted, fits: weights.Head | None) -> float:
    if model.logit_scale is not None:
        return math.log(model.logit_scale)
    if fits and fits.log_scale is not None:
        return fits.log_scale
    return math.log(main.init_logit_scale)


def _tell(model: config.Model, main: Wanted, loaded: weights.Head | None) -> None:
    if loaded is None:
        return
    if not _fits(loaded, main) and (model.logit_scale is None or model.logit_bias is None):
        scale = main.init_logit_scale if model.logit_scale is None else model.logit_scale
        bias = main.init_logit_bias if model.logit_bias is None else model.logit_bias
        log.warning(
            "model.pretrained %s was trained without a bias: objective %s starts from scale %.4g and bias %.4g instead",
            model.pretrained, _name(main), scale, bias,
        )  # fmt: skip
    if main.init_logit_bias is None and loaded.bias is not None:
        log.warning(
            "model.pretrained %s has a bias of %.4g, which objective %s has no use for: it is dropped",
            model.pretrained, loaded.bias, _name(main),
        )  # fmt: skip


def _under_ceiling(model: config.Model, objectives: Sequence[Wanted], head: Head) -> Head:
    """The ceiling, and a start that respects it: the user's ceiling lowers a start, the objective's gives way to it."""
    if model.logit_scale_max is not None:
        return _under_users_ceiling(model, model.logit_scale_max, head)
    ceiling = math.log(min(item.max_logit_scale for item in objectives))
    if head.log_scale > ceiling:
        log.warning(
            "the logit scale starts at %.4g, above the objective's ceiling of %.4g: the ceiling is raised to it",
            math.exp(head.log_scale), math.exp(ceiling),
        )  # fmt: skip
    return Head(head.log_scale, head.bias, max(ceiling, head.log_scale))


def _under_users_ceiling(model: config.Model, maximum: float, head: Head) -> Head:
    ceiling = math.log(maximum)
    if head.log_scale <= ceiling:
        return Head(head.log_scale, head.bias, ceiling)
    if model.logit_scale is not None:
        raise UserError(f"model.logit_scale {model.logit_scale} exceeds model.logit_scale_max {maximum}: change one")
    log.warning("model.logit_scale_max %.4g lowers the logit scale from %.4g", maximum, math.exp(head.log_scale))
    return Head(ceiling, head.bias, ceiling)


def _name(objective: Wanted) -> str:
    return type(objective).__name__.lower()
