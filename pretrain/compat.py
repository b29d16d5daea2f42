"""The one place that imports open_clip, which a torch and a torchvision of different builds (CPU, CUDA) break.

torchvision attaches shape functions to its own operators `nms` and `qnms` when it is imported. Their schemas come from
its compiled library, which does not load against a torch of another build, and the import ends with "operator
torchvision::nms does not exist". Nothing here uses these operators: declaring their schemas, without an implementation,
is enough for the rest of torchvision (image transforms) to work. Where the compiled library loads, nothing is declared.

Everybody writes `from pretrain.compat import open_clip`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _compiled_library() -> Path | None:
    """torchvision's compiled library, found without importing torchvision."""
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    names = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((folder / name for name in names if folder and (folder / name).is_file()), None)


def _loads(library: Path | None) -> bool:
    if library is None:
        return False
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True


def _declare_missing_operators() -> list[torch.library.Library]:
    """Schemas for the operators torchvision expects; the returned handles keep them alive."""
    if _loads(_compiled_library()):
        return []
    fragment = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            fragment.define(schema)  # type: ignore[no-untyped-call]
    return [fragment]


_DECLARED = _declare_missing_operators()

import open_clip  # noqa: E402 - only importable once the operators are declared

__all__ = ["Towers", "open_clip", "torchvision_is_whole"]


def torchvision_is_whole() -> bool:
    """Whether torchvision's compiled library loads with this torch."""
    return not _DECLARED


Towers = Any
"""open_clip's CLIP or CustomTextCLIP, whose attributes it leaves untyped."""
