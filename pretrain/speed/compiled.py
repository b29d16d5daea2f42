"""torch.compile of both towers: of their repeated blocks, which share one compiled form, or of whole towers.

Only the `forward` of a module is compiled. Names in its state_dict stay, and what an engine hangs on a module (FSDP2's
gathering) stays outside of the compiled code: blocks are compiled before `fully_shard`, as torchtitan does.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from pretrain.compat import Towers
from pretrain.speed.options import Speed
from pretrain.towers import blocks
from pretrain.towers.forward import replace_forward

log = logging.getLogger(__name__)
BACKEND = "inductor"
FORMS = 64
"""Compiled forms that blocks of one class may have: shapes, with and without gradients."""


def enable(towers: Towers, speed: Speed) -> None:
    """Compile both towers at their first call; a form that was compiled before comes from disk.

    Under `short_texts`, lengths are dynamic; everything else is compiled anew for each shape.
    """
    torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
    # Random numbers as without compiling: the cached-feature step draws them twice, in two compiled forms.
    torch._inductor.config.fallback_random = True
    _cache_on_disk()
    for tower, modules in targets(towers, whole=speed.cuda_graphs).items():
        dynamic = tower == "text" and speed.short_texts
        for module in modules:
            compiled = torch.compile(module.forward, backend=BACKEND, dynamic=dynamic, mode=_mode(speed))
            replace_forward(module, compiled)


def targets(towers: Towers, whole: bool) -> dict[str, list[nn.Module]]:
    """What is compiled of each tower: its blocks, or what holds it where it has none or is wanted whole."""
    found: dict[str, list[nn.Module]] = {}
    for tower, roots in blocks.parts(towers).items():
        repeated = [] if whole else [block for root in roots for block in blocks.blocks(root)]
        found[tower] = repeated or [root for root in roots if any(True for _ in root.children())]
    return found


def cache_folder() -> Path:
    """Where compiled code is kept between runs: TORCHINDUCTOR_CACHE_DIR, else the user's cache folder."""
    asked = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if asked and asked != default_cache_dir():  # which inductor writes there itself, and a restart may empty
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain" / "inductor"


def _cache_on_disk() -> None:
    folder = str(cache_folder())
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") != folder:
        log.info("model.speed: compiled code is kept in %s (TORCHINDUCTOR_CACHE_DIR)", folder)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def _mode(speed: Speed) -> str | None:
    """Other backends than inductor, which tests use, have no modes."""
    return speed.mode if BACKEND == "inductor" else None
