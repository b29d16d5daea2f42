"""What `model.speed` does to a dual encoder, and why it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.compat import Towers
from pretrain.errors import UserError
from pretrain.speed import causal, channels_last, compiled, short_texts
from pretrain.speed.options import Speed

UNFIT = {"causal": causal.unfit, "short_texts": short_texts.unfit, "channels_last": channels_last.unfit}


@dataclass(frozen=True)
class Ways:
    """How inputs reach the towers."""

    encode_text: short_texts.Encode
    """[B, L] int64 -> [B, D], not normalised."""
    pixels: torch.memory_format = torch.contiguous_format
    compiled: bool = False
    selective: bool = False
    """Whether checkpointing keeps some operators' results, and so expects the same operators again."""


def apply(towers: Towers, speed: Speed, device: torch.device) -> Ways:
    """Change both towers, whose checkpointing is in place already; before an engine wraps them.

    Raises:
        UserError: an entry can do nothing for these towers or this device. `causal` alone then does nothing.
    """
    if speed.cuda_graphs and device.type != "cuda":
        raise UserError(f"model.speed cuda_graphs needs a CUDA device, not {device.type}: take compile")
    for entry in ("short_texts", "channels_last"):
        if getattr(speed, entry) and (why := UNFIT[entry](towers)):
            raise UserError(f"model.speed {entry}: {why}; leave it out")
    # A cut mask would be needed otherwise: short texts come without any.
    if (speed.causal or speed.short_texts) and causal.unfit(towers) is None:
        causal.enable(towers)
    if speed.compile:
        compiled.enable(towers, speed)
    return Ways(
        short_texts.encoder(towers) if speed.short_texts else towers.encode_text,
        torch.channels_last if speed.channels_last else torch.contiguous_format,
        speed.compile,
    )
