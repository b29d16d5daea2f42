"""What every proof's fresh process shares: the images, texts and tokens to take, and where the results go.

Nothing here or beside it imports this project: a copy must work without it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

BATCHES = (1, 3, 17)


def each(main: Callable[[Path, Path], None]) -> None:
    """Load the exports that the command line names: a folder and a place for its results, and further pairs."""
    paths = [Path(word) for word in sys.argv[1:]]
    for folder, work in zip(paths[::2], paths[1::2], strict=True):
        main(folder, work)


def images(place: Path) -> list[Image.Image]:
    """RGB."""
    return [Image.open(path).convert("RGB") for path in sorted(place.glob("*.png"))]


def facts(place: Path) -> dict[str, Any]:
    """'texts', and the 'threads' to compute with: sums split over another number of them may round differently."""
    found: dict[str, Any] = json.loads((place / "probe.json").read_text())
    return found


def batched(rows: int) -> Iterator[tuple[int, list[slice]]]:
    """Batch sizes, and how each divides the rows, the last batch smaller."""
    for size in BATCHES:
        yield size, [slice(at, at + size) for at in range(0, rows, size)]


def tell(place: Path, **remarks: Any) -> None:
    """Leave remarks for parity.json, and make sure that this process has not seen this project."""
    known = sorted(name for name in sys.modules if name.partition(".")[0] == "pretrain")
    if known:
        raise SystemExit(f"this proof must not import {known[0]}")
    (place / "told.json").write_text(json.dumps(remarks))


def mend_torchvision() -> None:
    """Declare the two operators that torchvision expects where its compiled library does not fit this torch."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = [folder / f"_C{end}" for end in importlib.machinery.EXTENSION_SUFFIXES] if folder else []
    for file in filter(Path.is_file, files):
        try:
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
            return
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _KEPT.append(library)


_KEPT: list[Any] = []
"""A library's schemas last as long as it does."""
