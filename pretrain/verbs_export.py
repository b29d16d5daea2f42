"""`pretrain export`: what it takes from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from pretrain import flags
from pretrain.show import show

Average = Literal["auto", "yes", "no"]
_AVERAGE: dict[Average, bool | None] = {"auto": None, "yes": True, "no": False}


def export(args: list[str]) -> None:
    """`pretrain export RUN OUT --to FORMAT`."""
    flags.command(_export, args, "pretrain export")


def _export(
    source: Positional[str],
    out: Positional[Path],
    /,
    *,
    to: str = "open_clip",
    tower: Literal["both", "image", "text"] = "both",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    patch_tokens: bool = False,
    embeddings: bool = False,
    average: Average = "auto",
    json: bool = False,
) -> None:
    """Write the encoders of a run in another library's format, and prove the copy equal in a fresh process.

    Args:
        source: Run folder or checkpoint folder.
        out: Folder to make.
        to: open_clip, transformers, sentence_transformers, onnx, torch_export or safetensors.
        tower: Which encoder.
        precision: For onnx, of weights and arithmetic.
        patch_tokens: For onnx and torch_export, the projected features of each patch as a second output.
        embeddings: For onnx and torch_export, texts come as embeddings of their tokens, for learned prompts.
        average: Use the averaged (EMA) weights; auto: where there are any.
        json: Print one JSON object instead of a table.
    """
    from pretrain.export import export
    from pretrain.export.base import Asked

    show(export(source, out, to, Asked(tower, precision, patch_tokens, embeddings), _AVERAGE[average]), json)
