"""Pixels laid out channels last, as the fastest convolutions want them; activations follow the pixels.

Weights keep their layout, so that checkpoints, moments and shards know nothing of it: a convolution reorders its own,
which are small beside its activations.
"""

from __future__ import annotations

from torch import nn

from pretrain.compat import Towers


def unfit(towers: Towers) -> str | None:
    """Why the layout would change nothing; None: it would."""
    visual = towers.visual
    kind = type(getattr(visual, "trunk", visual)).__name__
    convolutions = [module for module in visual.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) < 2:
        return f"the image tower ({kind}) has no convolutions besides the one that cuts patches"
    return None
