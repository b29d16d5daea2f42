"""A folder as sentence-transformers' users load it."""

from __future__ import annotations

from pathlib import Path

import place
import torch

place.mend_torchvision()

from safetensors.torch import save_file  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402


def main(folder: Path, work: Path) -> None:
    asked = place.facts(work)
    torch.set_num_threads(asked["threads"])
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    inputs = {"image_features": place.images(work), "text_features": asked["texts"]}
    found: dict[str, torch.Tensor] = {}
    for name, rows in inputs.items():
        for size in place.BATCHES if rows else ():
            found[f"{name}/{size}"] = torch.from_numpy(model.encode(rows, batch_size=size, show_progress_bar=False))
    save_file(found, work / "there.safetensors")
    place.tell(work, compared="what encode() gives; pixels and tokens stay inside it")


if __name__ == "__main__":
    place.each(main)
