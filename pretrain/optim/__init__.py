"""Optimizers, their rates by samples seen, and gradient norms. State goes by parameter name, never by position."""

from pretrain.optim.build import build
from pretrain.optim.groups import undecayed
from pretrain.optim.leave_out import reads_on_device, step_if
from pretrain.optim.moments import load_moments, moments
from pretrain.optim.norms import clip, grad_norms
from pretrain.optim.schedule import learning_rate, set_rate, tell

__all__ = [
    "build",
    "clip",
    "grad_norms",
    "learning_rate",
    "load_moments",
    "moments",
    "reads_on_device",
    "set_rate",
    "step_if",
    "tell",
    "undecayed",
]
