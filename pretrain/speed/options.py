"""The words of `model.speed` and `model.grad_checkpointing`, and which of them fit together. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import Model

ENTRIES = ("causal", "channels_last", "compile", "compile=max-autotune", "cuda_graphs", "short_texts")
CHECKPOINTING = "off, all, every=N (each N-th block) or selective"


@dataclass(frozen=True)
class Speed:
    """`model.speed`, read."""

    causal: bool = False
    """Attention of causal text towers without a dense mask."""
    short_texts: bool = False
    """Token columns cut to the longest caption of a pass."""
    channels_last: bool = False
    """Pixels, and with them all activations of convolutions, laid out channels last."""
    compile: bool = False
    """torch.compile of blocks, or with CUDA graphs of whole towers."""
    tuned: bool = False
    """Let the compiler try more kernels."""
    cuda_graphs: bool = False
    """Record kernels once, replay them with one launch."""

    @property
    def mode(self) -> str:
        """What torch.compile calls this."""
        if self.cuda_graphs:
            return "max-autotune" if self.tuned else "reduce-overhead"
        return "max-autotune-no-cudagraphs" if self.tuned else "default"


@dataclass(frozen=True)
class Checkpointing:
    """`model.grad_checkpointing`, read."""

    every: int = 0
    """Each so many-th block is computed again in the backward pass; 0: none."""
    selective: bool = False
    """Results of matrix products, convolutions and attention are kept all the same."""


def read(entries: tuple[str, ...]) -> Speed:
    """Entries of `model.speed` that `problems` finds nothing wrong with."""
    known = set(entries)
    graphs, tuned = "cuda_graphs" in known, "compile=max-autotune" in known
    return Speed(
        causal="causal" in known,
        short_texts="short_texts" in known,
        channels_last="channels_last" in known,
        compile=graphs or tuned or "compile" in known,
        tuned=tuned,
        cuda_graphs=graphs,
    )


def problems(model: Model, engine: str) -> Iterator[str]:
    """One sentence for each entry that is unknown, or stands beside the wrong ones."""
    entries = model.speed
    for entry in entries:
        if entry not in ENTRIES:
            yield f"model.speed {entry!r} does not exist; there are {', '.join(ENTRIES)}"
    if len(set(entries)) < len(entries):
        yield f"model.speed {list(entries)} names something twice: once is enough"
    if "cuda_graphs" in entries and "short_texts" in entries:
        yield "model.speed cuda_graphs needs one shape, and short_texts gives many: take one of them"
    if "cuda_graphs" in entries and engine in ("fsdp2", "deepspeed"):
        yield f"model.speed cuda_graphs needs weights that stay, and engine {engine} moves them: take compile, or ddp"
    if not 0 <= model.patch_dropout < 1:
        yield f"model.patch_dropout {model.patch_dropout} must lie in [0, 1)"
    if read_checkpointing(model.grad_checkpointing) is None:
        yield f"model.grad_checkpointing {model.grad_checkpointing!r} must be {CHECKPOINTING}"


def read_checkpointing(text: str) -> Checkpointing | None:
    """`model.grad_checkpointing`; None where it is none. Configs that have true or false mean all or off."""
    word = str(text).lower()
    if word in ("off", "false"):
        return Checkpointing()
    if word in ("all", "true"):
        return Checkpointing(every=1)
    if word == "selective":
        return Checkpointing(every=1, selective=True)
    every = re.fullmatch(r"every=([1-9]\d*)", word)
    return Checkpointing(every=int(every[1])) if every else None
